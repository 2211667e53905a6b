"""The state in torch.optim's form, which ``torch.distributed.checkpoint``, Accelerate and HF's Trainer read and write.

::

    {"state": {i: {"step": (), "U": (m, r), "V": (n, r), "sigma": (r,), "master": (m, n)}, j: {"step", "exp_avg", ...}},
     "param_groups": [{"lr": ..., "params": [i, ...]}, ...]}

Keys are positions over all param groups, the matrices' first. Where the weight is a DTensor, what has rows is one too, cut
by rows over the same mesh, and so are masters; spectra are whole everywhere. So the keys are the same on every process, each
row is written once, and any number of processes can load it. They must be there before the first step: a reader that
finds none takes a step with gradients of zero to bring them about.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_mofa.adamw.eight_bit import AdamW8bit
from ds_mofa.parameters import Matrix, is_sharded
from ds_mofa.step.backend import Backend
from ds_mofa.step.state import WAY_OUT, assembled
from ds_mofa.step.step import MatrixStep

__all__ = [
    "by_position",
    "is_by_position",
    "load_masters",
    "made_moments",
    "matrix_states",
    "misfit",
    "named",
    "placeholders",
    "positions",
]


def positions(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups with the position of each parameter over all of them in the place of the parameter."""
    count = itertools.count()
    return [{**group, "params": [next(count) for _ in group["params"]]} for group in groups]


def matrix_states(step: MatrixStep) -> Iterator[dict[str, Tensor]]:
    """The state of each matrix in turn. Collective before the first of them."""
    flat, layout = step.owner.everywhere(), step.owner.state_layout
    masters = step.masters.of(range(len(step.members)))
    for matrix in step.members:
        one = {"step": torch.tensor(float(step.steps), dtype=torch.float32, device="cpu")}
        for name, view in zip(step.rule.field_names(), layout.views(flat, matrix.index), strict=True):
            one[name] = (step.backend.rows(matrix, view) if view.dim() > 1 else view).clone()
        if masters is not None:
            one["master"] = step.backend.like_weight(matrix, masters[matrix.index])
        yield one


def placeholders(step: MatrixStep) -> dict[str, None]:
    """The keys of a matrix's state, for whoever asks whether there is one."""
    masters = () if step.masters.of(()) is None else ("master",)
    return dict.fromkeys(("step", *step.rule.field_names(), *masters))


def made_moments(adamw: torch.optim.Optimizer | None) -> Mapping[Any, Any]:
    """AdamW's state, with moments of zero where it has none yet: a checkpoint is loaded into it key by key."""
    if adamw is None:
        return {}
    for group in adamw.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for param in group["params"]:
            if param.requires_grad and not adamw.state.get(param):
                adamw.state[param] = (
                    adamw.new_state(param) if isinstance(adamw, AdamW8bit) else _moments(param, on_device)
                )
    return adamw.state


def _moments(param: Tensor, on_device: Any) -> dict[str, Tensor]:
    """As torch.optim.AdamW makes them."""
    step = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
    return {"step": step, **{name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}}


def by_position(states: Iterable[Any]) -> dict[int, Any]:
    """States in the order of the parameters; one that is None or empty has none."""
    return {i: one for i, one in enumerate(states) if one}


# ---------------------------------------------------------------------- loading


def is_by_position(state: Any) -> bool:
    """Whether a saved state has this form."""
    return isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys()


def misfit(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], title: str) -> str | None:
    """Why a saved state is not one of these param groups; None where it is.

    Args:
        groups: the matrices' first.
        title: of the matrices' optimizer.
    """
    ones = [one for one in saved["state"].values() if isinstance(one, Mapping)]
    if ones and all("exp_avg" in one or "momentum_buffer" in one for one in ones):
        return f"this is no state of {title} but of AdamW or another optimizer of torch.optim. {WAY_OUT}"
    there, here = ([len(group["params"]) for group in some] for some in (saved["param_groups"], groups))
    if there == here:
        return None
    return (
        f"the param groups of the state have {there} parameters, and this run's {here}: it is another optimizer's, or use the "
        "model, include, exclude and param groups that it was saved with"
    )


def named(state: Mapping[Any, Any], keys: Sequence[Any], step: MatrixStep) -> tuple[dict[str, Any], str | None]:
    """The matrices' part of a saved state, by name, as :meth:`MatrixStep.load_state_dict` takes it. Collective.

    Args:
        state: by ``keys``.
        keys: of the matrices, in their order.

    Returns:
        It, and why there is none.
    """
    found, steps = {}, set()
    names = step.rule.field_names()
    for matrix, key in zip(step.members, keys, strict=True):
        one = state.get(key)
        lacking = [name for name in ("step", *names) if not isinstance(one, Mapping) or name not in one]
        if lacking:
            there = ", ".join(map(str, one)) if isinstance(one, Mapping) else "nothing"
            return {}, (
                f"the state of {matrix.name!r} has {there}, and lacks {lacking[0]!r} of {step.rule.name}: it is another "
                f"optimizer's, or was saved with another include or exclude. {WAY_OUT}"
            )
        assert isinstance(one, Mapping)
        steps.add(int(one["step"]))
        found[matrix.name] = {name: _everywhere(one[name]) for name in names}
    if len(steps) != 1:
        return {}, f"the matrices' states are of different steps, {sorted(steps)}. {WAY_OUT}"
    return assembled(step.rule.name, found, steps=steps.pop(), skipped=0), None


def load_masters(state: Mapping[Any, Any], keys: Sequence[Any], step: MatrixStep) -> None:
    """Take over the masters where there are any, and read the others from the weights."""
    saved = [state[key].get("master") for key in keys]
    parts = [
        None if value is None else _part(value, matrix, step.backend)
        for matrix, value in zip(step.members, saved, strict=True)
    ]
    step.masters.load_parts(parts)


def _part(value: Any, matrix: Matrix, backend: Backend) -> Tensor:
    """This process's elements of a master, flat."""
    if is_sharded(value):
        return value.to_local().reshape(-1)
    shard = backend.shard_of(matrix)
    return value.reshape(-1)[shard.start : shard.start + shard.flat.numel()]


def _everywhere(value: Any) -> Any:
    return value.full_tensor() if is_sharded(value) else value
