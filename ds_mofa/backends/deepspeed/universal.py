"""Universal checkpoints: resume on any number of ranks, in ZeRO stage 1, 2 or 3.

    python -m ds_mofa.to_universal --input_folder out/global_step100 --output_folder out/global_step100_universal

and ``"checkpoint": {"load_universal": true}`` in the config of the run that resumes.

DeepSpeed's own ``ds_to_universal`` cuts up what its AdamW has, one folder for each parameter; what it writes loads
into the family of stages (1 and 2, or 3) that it came from. :func:`convert` runs it, and completes the folder: with
the weights that are in no optimizer of DeepSpeed's (the matrices, from their fp32 masters where there are some, and
frozen parameters), and with what the other family looks for. :func:`restore` loads either kind of folder.
"""

import argparse
import contextlib
import functools
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime import engine as ds_engine
from torch import Tensor, nn

from ds_mofa.backends.deepspeed import checkpoints
from ds_mofa.backends.deepspeed.checkpoints import CheckpointError
from ds_mofa.backends.deepspeed.matrices import is_partitioned, local_shard
from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.parameters import full_shape

__all__ = ["completed", "convert", "model_states", "restore", "write_model_states"]

_MODEL = "mp_rank_00_model_states.pt"
_MODEL_STAGE3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"


# ---------------------------------------------------------------------- making one


def convert(source: Path, target: Path, workers: int = 4, trusted: bool = False) -> None:
    """Write the universal checkpoint of ``source`` to ``target``, and ``latest_universal`` beside it.

    ``target`` appears when it is complete; until then its files are in a new folder beside it, ``.TARGET.`` and random
    letters, which goes away with an error too.

    Args:
        source: the folder of one tag.
        target: must not exist.
        workers: processes.
        trusted: run what the files' pickles say, where they hold more than tensors and what DeepSpeed writes.

    Raises:
        CheckpointError: ``source`` is damaged or not one to convert, holds objects that only running code from it would
            make, or ``target`` exists.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    manifest = checkpoints.read_manifest(source)
    if manifest is None or manifest["universal"] or not manifest["zero_stage"]:
        reason = (
            f"it has no {checkpoints.MANIFEST}: its save was interrupted, or another optimizer wrote it"
            if manifest is None
            else "it is one already"
            if manifest["universal"]
            else "it was saved at ZeRO stage 0, which DeepSpeed has none for. It is resumed at stage 0, on any number "
            "of ranks, as it is"
        )
        raise CheckpointError(f"{source} cannot be made a universal checkpoint: {reason}")
    if manifest.get("adamw_states", "full") != "full":
        raise CheckpointError(
            f"{source} cannot be made a universal checkpoint: its AdamW moments are in 8 bits (adamw_states), which "
            "DeepSpeed cannot cut up anew. It is resumed as it is, at its stage, on as many ranks; or go on from its "
            "weights alone, with load_optimizer_states=False"
        )
    if target.exists():
        raise CheckpointError(f"{target} exists already: give another --output_folder, or remove it")
    checkpoints.check(source, manifest)
    strange = {path.name for path in source.iterdir() if _is_read(path.name)} - manifest["files"].keys()
    if strange:  # DeepSpeed would take them for ranks
        raise CheckpointError(
            f"{source} also holds files of another save, such as {min(strange)}, which its {checkpoints.MANIFEST} does "
            "not list: move them away"
        )

    if not trusted:  # DeepSpeed's converter runs what they hold
        for name in manifest["files"]:
            if _is_read(name):
                checkpoints.load(source / name)

    with completed(target, manifest) as folder:
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(source),
                output_folder=str(folder),
                num_extract_workers=workers,
                num_merge_workers=workers,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
        _complete(source, folder, manifest, trusted)


@contextlib.contextmanager
def completed(target: Path, description: Mapping[str, Any]) -> Iterator[Path]:
    """Within: a new folder to write a universal checkpoint into, which then gets its manifest and becomes ``target``.

    Args:
        target: absolute.
        description: of the manifest.

    Raises:
        CheckpointError: ``target`` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already: give another --output_folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as partial:
        folder = Path(partial) / target.name
        folder.mkdir()
        yield folder
        files = checkpoints.files_of(folder, sorted(str(path.relative_to(folder)) for path in folder.rglob("*.pt")))
        crc32 = torch.serialization.get_crc32_options()
        checkpoints.seal(folder, {**description, "universal": True, "crc32": crc32}, files)
        folder.replace(target)
    checkpoints.write_atomically(target.parent / "latest_universal", target.name.encode())


def _is_read(name: str) -> bool:
    """Whether DeepSpeed's converter takes a file for a part of the checkpoint, and so for what it may run."""
    return name.endswith(".pt") or name.startswith(("layer_", "mp_rank_", "zero_", "bf16_zero_"))


def _complete(source: Path, folder: Path, manifest: Mapping[str, Any], trusted: bool) -> None:
    load = functools.partial(checkpoints.load, trusted=trusted)
    zero, world, stage3 = folder / "zero", manifest["world_size"], manifest["zero_stage"] == 3
    optim_files = ds_to_universal._get_optim_files(str(source))[:world]
    if stage3:
        model_files = [source / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world)]
    else:
        model_files = [source / _MODEL]
    models = [load(path) for path in model_files]
    shapes = {name: shape for group in models[0]["param_shapes"] for name, shape in group.items()}

    state = load(zero / "optimizer_state.pt", mmap=False)
    ours = state.get("mofasgd")
    if ours is None:
        raise CheckpointError(f"{source}: the optimizer's state of rank 0 holds nothing of MoFaSGD's")
    if stage3:
        step = state["optimizer_state_dict"]["state"][0]["step"]
        parts = [load(path)["optimizer_state_dict"]["mofasgd"]["masters"] for path in optim_files]
        masters = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for name, shape in shapes.items():
            for key in ("fp32", "exp_avg", "exp_avg_sq"):
                flat = load(zero / name / f"{key}.pt", mmap=False)
                torch.save({"param": flat.view(shape)}, zero / name / f"{key}.pt")
            torch.save(step, zero / name / "step.pt")
        del state["fp32_flat_groups"]
        state["ds_version"] = models[0]["ds_version"]
    else:
        masters = ours["masters"]
        steps = (zero / name / "step.pt" for name in shapes)
        step = next((load(path) for path in steps if path.is_file()), None)
    # Where stage 3 looks for the step; the rest of what it keeps there is rank 0's shards, of no use here.
    state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": state["param_groups"]}
    state["mofasgd"] = {**ours, "masters": {}}
    torch.save(state, zero / "optimizer_state.pt")

    for name, shape in models[0]["frozen_param_shapes"].items():
        whole = masters.get(name)
        if whole is None:
            whole = torch.cat([model["frozen_param_fragments"][name].flatten() for model in models])
        (zero / name).mkdir(exist_ok=True)
        torch.save({"param": whole.flatten()[: shape.numel()].view(shape).clone()}, zero / name / "fp32.pt")

    for path in folder.glob("*_model_states.pt"):
        path.unlink()
    model = models[0]  # less the weights, which are in zero/
    buffers = {name: model["module"][name] for name in model["buffer_names"]}
    slim = {**model, "module": buffers, "frozen_param_fragments": None, "frozen_param_shapes": None}
    write_model_states(slim, folder)


def write_model_states(slim: Mapping[str, Any], folder: Path) -> None:
    """What DeepSpeed reads beside ``zero/``, where each of its two families of stages looks for it."""
    for name in (_MODEL, _MODEL_STAGE3):
        torch.save(dict(slim), folder / name)


def model_states(folder: Path) -> Path:
    """One of the files of :func:`write_model_states`."""
    return folder / _MODEL


# ---------------------------------------------------------------------- loading one


@torch.no_grad()
def restore(engine, mofa: MatrixOptimizer, folder: Path, with_state: bool) -> None:
    """What DeepSpeed does not load of a universal checkpoint: parameters outside its groups, buffers, factors.

    It is called after DeepSpeed's part and before parameters that stage 3 keeps whole are gathered. Collective.

    Args:
        with_state: the optimizer's state too.
    """
    state = checkpoints.load(folder / "zero" / "optimizer_state.pt")
    source = _Outside(folder)
    saved_masters = state.get("mofasgd", {}).get("masters", {})
    masters = {}
    for name, param in engine.module.named_parameters():
        if ds_engine.is_optimized_parameter(param):
            continue
        whole = source.weight(engine.param_names[param])
        numel = math.prod(full_shape(param))
        if whole.numel() != numel:
            raise CheckpointError(
                f"{folder}: {name!r} has {whole.numel()} elements there, {numel} in this model. Use the model that the "
                "checkpoint was saved with"
            )
        if is_partitioned(param):
            shard = local_shard(param)
            held = slice(shard.start, shard.start + shard.flat.numel())
            shard.flat.copy_(whole[held])
        else:
            held = slice(None)
            param.data.copy_(whole.view_as(param))
        master = saved_masters.get(name, whole)
        if master.numel() != numel:
            raise CheckpointError(
                f"{folder}: DeepSpeed's ds_to_universal has kept rank 0's part of the fp32 masters alone. Convert the "
                f"original checkpoint with\n  {checkpoints.CONVERT.format('CHECKPOINT', 'CHECKPOINT')}"
            )
        masters[name] = master.flatten()[held].float()
    for name, buffer in source.buffers(engine.module):
        buffer.copy_(source.module[name])
    if not with_state:
        mofa.matrices.masters.refresh()
        return
    engine.optimizer.load_matrices(state, masters)
    _restore_groups(engine.optimizer.optimizer, state["param_groups"])


def _restore_groups(adamw: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Stage 3 gives every group the settings of the first, and all states one tensor that counts the steps."""
    if len(saved) != len(adamw.param_groups):
        raise CheckpointError(
            f"the checkpoint has {len(saved)} AdamW param groups, this run has {len(adamw.param_groups)}: use the "
            "param groups that it was saved with"
        )
    for group, settings in zip(adamw.param_groups, saved):
        group.update({key: value for key, value in settings.items() if key != "params"})
    for one in adamw.state.values():
        if isinstance(one.get("step"), Tensor):
            one["step"] = one["step"].clone()


class _Outside:
    """The weights of parameters outside DeepSpeed's groups, flat, by name."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._models: list[dict] | None = None

    def weight(self, name: str) -> Tensor:
        path = self._folder / "zero" / name / "fp32.pt"
        if path.is_file():
            return checkpoints.load(path)["param"].flatten()
        # DeepSpeed's converter leaves them where stage 3 has saved them.
        try:
            return torch.cat([model["frozen_param_fragments"][name].flatten() for model in self._shards()])[
                : self._shards()[0]["frozen_param_shapes"][name].numel()
            ]
        except (KeyError, TypeError):
            raise CheckpointError(
                f"{self._folder}: the checkpoint has no parameter {name!r}. Use the model that it was saved with"
            ) from None

    @property
    def module(self) -> Mapping[str, Tensor]:
        """What was saved with the model's buffers: these, or all that was not trained."""
        return self._shards()[0]["module"]

    def buffers(self, module: nn.Module) -> list[tuple[str, Tensor]]:
        """Those of ``module`` that were saved."""
        names = self._shards()[0]["buffer_names"]
        if names is None:  # whoever wrote it could not tell buffers from frozen weights
            return [(name, buffer) for name, buffer in module.named_buffers() if name in self.module]
        return [(name, module.get_buffer(name)) for name in names]

    def _shards(self) -> list[dict]:
        if self._models is None:
            paths = sorted(self._folder.glob("*_model_states.pt"), key=lambda p: ds_to_universal.natural_keys(p.name))
            # With its client_state, which may be of any kind: DeepSpeed has loaded it before.
            self._models = [checkpoints.load(path, trusted=True) for path in paths]
        return self._models
