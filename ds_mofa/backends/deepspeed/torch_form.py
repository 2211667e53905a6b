"""From torch.optim's form of a run, by parameter names, to a universal checkpoint of DeepSpeed's, and back.

::

    {"model": {name: weight or buffer},
     "optim": {"state": {name: {"step", "U", "V", "sigma", "master"} or {"step", "exp_avg", "exp_avg_sq"}},
               "param_groups": [{"params": [name, ...], "lr": ..., ...}, ...]},
     "lr_scheduler": ...}

The first two are what ``get_model_state_dict`` and ``get_optimizer_state_dict`` of ``torch.distributed.checkpoint`` give with
``full_state_dict``, on any engine; the scheduler's state may be there. In fp32 nothing is lost either way. ZeRO
keeps fp32 copies of what AdamW trains, and a plain loop in 16 bits does not: these start from the weights, and end in them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from ds_mofa.backends.deepspeed import checkpoints, universal
from ds_mofa.backends.deepspeed.checkpoints import CheckpointError
from ds_mofa.optimizers.registry import OPTIMIZERS, Entry
from ds_mofa.step.state import assembled

__all__ = ["from_universal", "to_universal"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SETTINGS = ("lr", "lr_scale", "betas", "eps", "weight_decay")  # what every AdamW has
_NAMED = (
    "save what get_model_state_dict and get_optimizer_state_dict of torch.distributed.checkpoint.state_dict give with "
    "StateDictOptions(full_state_dict=True, cpu_offload=True), as {'model': ..., 'optim': ...}"
)


# ---------------------------------------------------------------------- into ZeRO


def to_universal(state: Mapping[str, Any], target: Path) -> None:
    """Write the universal checkpoint of a run in torch's form.

    Args:
        state: see the module.
        target: must not exist.

    Raises:
        CheckpointError: ``state`` is of another form or optimizer, or ``target`` exists.
    """
    model, states, groups = _checked(state)
    _require(model, [name for group in groups for name in group["params"]])
    matrices = {name: one for name, one in states.items() if not _is_adamws(one)}
    own = [group for group in groups if "lr_scale" not in group]
    rest = [group for group in groups if "lr_scale" in group]
    entry = _entry_of(matrices)
    packed = _packed(entry, matrices)
    description = checkpoints.describe(
        entry.name,
        {name: model[name].shape for name in matrices},
        zero_stage=1,
        world_size=1,
        rank=next(iter(matrices.values()))[_fields(entry)[-1]].shape[-1],
        adamw_states="full",
    )
    with universal.completed(Path(target).absolute(), description) as folder:
        for name, weight in model.items():
            _save(folder, name, "fp32", {"param": _plain(states.get(name, {}).get("master", weight))})
        steps = [
            _write_moments(folder, name, model[name], states.get(name, {}))
            for group in rest
            for name in group["params"]
        ]
        settings = [{key: group[key] for key in _SETTINGS} for group in rest]
        step = {"step": max(steps, default=torch.tensor(0.0))}  # stage 3 has one for all
        optimizer = {
            "ds_version": deepspeed.__version__,
            "mofasgd": {"matrices": packed, "masters": {}, "groups": [_settings(group) for group in own]},
            "param_groups": settings,
            "optimizer_state_dict": {"state": {0: step}, "param_groups": settings},
        }
        torch.save(optimizer, folder / "zero" / "optimizer_state.pt")
        trained = {name for group in groups for name in group["params"]}
        universal.write_model_states(
            {
                "module": {name: _plain(value) for name, value in model.items() if name not in trained},
                "buffer_names": None,  # frozen weights are among these
                "param_shapes": [{name: model[name].shape for name in group["params"]} for group in rest],
                "frozen_param_shapes": None,
                "frozen_param_fragments": None,
                "shared_params": {},
                "lr_scheduler": state.get("lr_scheduler"),
                "skipped_steps": 0,
                "global_steps": int(packed["steps"]),
                "dp_world_size": 1,
                "mp_world_size": 1,
                "ds_config": {},
                "ds_version": deepspeed.__version__,
            },
            folder,
        )


def _checked(state: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    optim = state.get("optim")
    if not isinstance(state.get("model"), Mapping) or not isinstance(optim, Mapping) or "param_groups" not in optim:
        raise CheckpointError(f"it has {', '.join(map(repr, state))}, and not a model and an optimizer: {_NAMED}")
    states, groups = optim["state"], optim["param_groups"]
    if not all(isinstance(name, str) for group in groups for name in group["params"]):
        raise CheckpointError(f"its optimizer's state has positions in the place of names: {_NAMED}")
    if any("exp_avg_codes" in one for one in states.values()):
        raise CheckpointError(
            "its AdamW moments are in 8 bits (adamw_states), which DeepSpeed cannot cut up: go on from the weights alone"
        )
    if all(map(_is_adamws, states.values())):
        raise CheckpointError("it holds the state of AdamW alone: nothing of an optimizer of ds_mofa")
    return state["model"], states, groups


def _require(model: Mapping[str, Tensor], names: Iterable[str]) -> None:
    lacking = sorted(set(names) - model.keys())
    if lacking:
        raise CheckpointError(f"the optimizer has trained {lacking[0]!r}, of which there is no weight. {_NAMED}")


def _entry_of(matrices: Mapping[str, Mapping[str, Any]]) -> Entry:
    """Whose state it is: the form has tensors and no name."""
    names = {frozenset(one) - {"step", "master"} for one in matrices.values()}
    for entry in OPTIMIZERS.values():
        if names == {frozenset(_fields(entry))}:
            return entry
    raise CheckpointError(f"the matrices' states, of {sorted(min(names))}, are of no optimizer that is registered")


def _packed(entry: Entry, matrices: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    steps = max(int(one["step"]) for one in matrices.values())
    named = {name: {key: _plain(one[key]) for key in _fields(entry)} for name, one in matrices.items()}
    return assembled(entry.name, named, steps=steps, skipped=0)


def _fields(entry: Entry) -> tuple[str, ...]:
    names = getattr(entry.optimizer.rule_class, "field_names", tuple)  # a registered one may be any callable
    return tuple(names())


def _write_moments(folder: Path, name: str, weight: Tensor, one: Mapping[str, Any]) -> Tensor:
    """AdamW's state of one parameter; zeros where it never had a gradient. Returns its step."""
    for key in _MOMENTS:
        _save(folder, name, key, {"param": _plain(one[key]).float() if one else torch.zeros(weight.shape)})
    _save(folder, name, "fp32", {"param": _plain(weight).float()})
    step = torch.tensor(float(one["step"]) if one else 0.0)
    _save(folder, name, "step", step)
    return step


def _save(folder: Path, name: str, key: str, value: Any) -> None:
    place = folder / "zero" / name
    place.mkdir(parents=True, exist_ok=True)
    torch.save(value, place / f"{key}.pt")


# ---------------------------------------------------------------------- and back


def from_universal(folder: Path, trusted: bool = False) -> dict[str, Any]:
    """A universal checkpoint in torch's form, on the CPU; see the module.

    Args:
        folder: as ``python -m ds_mofa.to_universal`` writes it.
        trusted: run what the files' pickles say, where they hold more than tensors and what DeepSpeed writes.

    Raises:
        CheckpointError: it is damaged or not a universal checkpoint, or has several param groups of matrices, of whose
            members nothing is saved.
    """
    folder = Path(folder).absolute()
    manifest = checkpoints.read_manifest(folder)
    if manifest is None or not manifest["universal"]:
        raise CheckpointError(
            f"{folder} is not a universal checkpoint of ds_mofa's: make one with\n  "
            f"{checkpoints.CONVERT.format(folder, folder)}"
        )
    checkpoints.check(folder, manifest)
    saved = checkpoints.load(folder / "zero" / "optimizer_state.pt", trusted=trusted)
    described = checkpoints.load(universal.model_states(folder), trusted=trusted)
    ours, names = saved["mofasgd"], list(manifest["matrices"])
    if len(ours["groups"]) != 1:
        raise CheckpointError(f"{folder} has {len(ours['groups'])} param groups of matrices: one can be converted")
    files = {path.parent.relative_to(folder / "zero"): path for path in (folder / "zero").rglob("fp32.pt")}
    weights = {str(name): checkpoints.load(path, trusted=trusted)["param"] for name, path in sorted(files.items())}
    model = {**weights, **described["module"]}
    model |= {other: model[name] for other, name in described["shared_params"].items()}  # stage 3 saves them once
    configured = described["ds_config"] or {}
    in_16_bits = any(configured.get(kind, {}).get("enabled") for kind in ("bf16", "bfloat16", "fp16"))
    states: dict[str, dict[str, Tensor]] = {}
    for name in names:
        states[name] = {"step": torch.tensor(float(ours["matrices"]["steps"])), **ours["matrices"]["matrices"][name]}
        if in_16_bits and weights[name].dtype == torch.float32:
            states[name]["master"] = weights[name]
    groups = [{**ours["groups"][0], "params": names}]
    for settings, members in zip(saved["param_groups"], described["param_shapes"], strict=True):
        groups.append({**{key: settings[key] for key in _SETTINGS if key in settings}, "params": list(members)})
        for name in members:
            place = folder / "zero" / name
            moments = {key: checkpoints.load(place / f"{key}.pt", trusted=trusted)["param"] for key in _MOMENTS}
            states[name] = {"step": checkpoints.load(place / "step.pt", trusted=trusted), **moments}
    scheduler = described["lr_scheduler"]
    optim = {"state": states, "param_groups": groups}
    return {"model": model, "optim": optim, **({} if scheduler is None else {"lr_scheduler": scheduler})}


def _is_adamws(one: Mapping[str, Any]) -> bool:
    return "exp_avg" in one or "exp_avg_codes" in one


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()  # a file of a view holds all that it is a view of
