"""Whether a checkpoint is whole and fits, known before anything of the engine is changed.

DeepSpeed writes the files. When all of them are there, a manifest is written beside them, atomically, which says
what they are: so a folder without one is a save that was interrupted. ``torch.save`` writes a zip archive, whose
directory at the end has the CRC-32 of every record, so the CRC-32 of that directory stands for the whole file and
saving takes no pass over it. On loading, the ranks share the files among them and read each once more, at gigabytes a
second. What no checksum covers is padding between records.
"""

import contextlib
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.step.state import STATE_FORMAT, misfit

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "agree",
    "check",
    "check_state",
    "describe",
    "files_of",
    "invalidate",
    "load",
    "refuse_ours",
    "verify",
    "write_atomically",
    "write_manifest",
]

MANIFEST = "mofasgd_manifest.json"
FORMAT = 1
_ENTRIES = {"format", "state_format", "universal", "zero_stage", "world_size", "rank", "matrices", "crc32", "files"}
_UNNAMED = "MoFaSGD"  # the manifests of which name no optimizer
CONVERT = "python -m ds_mofa.to_universal --input_folder {} --output_folder {}_universal"


def _stage_named(kind: Any, name: str) -> ZeroStageEnum:
    """In the place of ``getattr``, by which Python before 3.11.4 pickles a member of an enum: of this one alone."""
    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError("getattr of something else than DeepSpeed's stages")
    return ZeroStageEnum[name]


# Objects of its own in its files.
_OF_DEEPSPEED = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, (_stage_named, "builtins.getattr")]


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or does not fit this run; the message names the file, and the way out."""


def write_atomically(path: Path, content: bytes) -> None:
    """The whole content under that name, on the disk, or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# ---------------------------------------------------------------------- saving


def invalidate(engine, save_dir: str, tag: str) -> None:
    """Before a tag is written (again): until the save has ended, what lies there is not a checkpoint."""
    if _writes(engine):
        (Path(save_dir) / tag / MANIFEST).unlink(missing_ok=True)


def write_manifest(engine, mofa: MatrixOptimizer, save_dir: str, tag: str) -> None:
    """After a save, by one rank (of each node, where disks are not shared). Collective.

    Raises:
        CheckpointError: on every rank, where a file is missing or the manifest cannot be written.
    """
    problem = None
    if _writes(engine):
        folder = Path(save_dir) / tag
        try:
            _write(folder, _description(engine, mofa), _names(engine, save_dir, tag), engine.use_node_local_storage())
        except OSError as error:
            problem = f"{folder}: the checkpoint could not be completed: {error}. Free space, or save elsewhere"
    agree(problem)


def files_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, int | None]]:
    """Of each file its ``bytes`` and the CRC-32 of its ``directory``; None where it is no zip archive."""
    found = {}
    for name in names:
        path = folder / name
        directory = _directory_checksum(path) if zipfile.is_zipfile(path) else None
        found[name] = {"bytes": path.stat().st_size, "directory": directory}
    return found


def _directory_checksum(path: Path) -> int:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        file.seek(archive.start_dir)
        return zlib.crc32(file.read())


def seal(folder: Path, description: Mapping[str, Any], files: Mapping[str, Mapping[str, int | None]]) -> None:
    """Write the manifest of a folder whose files are all there."""
    body = {"format": FORMAT, **description, "files": dict(files)}
    write_atomically(folder / MANIFEST, json.dumps({**body, "checksum": _checksum(body)}, indent=1).encode())


def _write(folder: Path, description: Mapping[str, Any], names: list[str], some_elsewhere: bool) -> None:
    if some_elsewhere:
        names = [name for name in names if (folder / name).exists()]
    seal(folder, description, files_of(folder, names))


def _writes(engine) -> bool:
    return (engine.local_rank if engine.use_node_local_storage() else engine.global_rank) == 0


def _description(engine, mofa: MatrixOptimizer) -> dict[str, Any]:
    return describe(
        mofa.options.title,
        {matrix.name: matrix.full_shape for matrix in mofa.split.matrices},
        zero_stage=int(engine.zero_optimization_stage()),
        world_size=engine.seq_dp_world_size,
        rank=mofa.options.rank,
        adamw_states=mofa.options.adamw_states,
    )


def describe(title: str, matrices: Mapping[str, Sequence[int]], **run: Any) -> dict[str, Any]:
    """What a manifest says beside its files.

    Args:
        title: of the optimizer.
        matrices: their shapes by name.
        **run: ``zero_stage``, ``world_size``, ``rank`` and ``adamw_states`` of the run that is saved.
    """
    return {
        **({} if title == _UNNAMED else {"optimizer": title}),
        "state_format": STATE_FORMAT,
        "universal": False,
        **run,
        "matrices": {name: list(shape) for name, shape in matrices.items()},
        # Without it torch.save writes no checksums into its files, see torch.serialization.set_crc32_options.
        "crc32": torch.serialization.get_crc32_options(),
    }


def _names(engine, save_dir: str, tag: str) -> list[str]:
    """The files that all ranks together have written."""
    world = _world(engine)
    if engine.zero_optimization_partition_weights():
        paths = [engine._get_ckpt_name(save_dir, tag, pp_placeholder=str(rank)) for rank in range(world)]
    else:
        paths = [engine._get_ckpt_name(save_dir, tag)]
    if engine.zero_optimization():
        bf16 = engine.bfloat16_enabled()
        # Older ones have no such name; without model parallelism it is 0.
        mp_rank = getattr(engine, "checkpoint_mp_rank", 0)
        paths += engine._get_mp_rank_zero_checkpoint_names(save_dir, tag, mp_rank, world, bf16)
    return [os.path.relpath(path, Path(save_dir) / tag) for path in paths]


def _world(engine) -> int:
    return dist.get_world_size(engine.optimizer.dp_process_group) if engine.zero_optimization() else 1


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


# ---------------------------------------------------------------------- loading


def verify(engine, mofa: MatrixOptimizer, load_dir: str, tag: str, *, with_state: bool) -> None:
    """Refuse what :func:`check` refuses, on every rank alike. Collective.

    Args:
        with_state: the optimizer's state is wanted too, not the weights alone.
    """
    folder = Path(load_dir) / tag
    problem = None
    try:
        manifest = read_manifest(folder)
        if manifest is None and with_state and not engine.load_universal_checkpoint():
            raise CheckpointError(_without_manifest(folder))
        _check_place(engine, folder, manifest, with_state)
        if manifest is not None and with_state:
            _check_optimizer(folder, manifest, mofa)
            _check_matrices(folder, manifest, mofa)
            _check_adamw_states(folder, manifest, mofa)
            if not (manifest["universal"] or engine.use_node_local_storage()):
                _check_precision(folder, manifest, _names(engine, load_dir, tag))
        ranks = (0, 1) if engine.use_node_local_storage() else (engine.global_rank, dist.get_world_size())
        check(folder, manifest, *ranks)
    except CheckpointError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{folder}: the checkpoint could not be read: {error}"
    agree(problem)


def refuse_ours(engine, load_dir: str, tag: str) -> None:
    """Refuse to load this package's checkpoint, state and all, into an engine with another optimizer.

    Raises:
        CheckpointError: on every rank alike, before anything is loaded.
    """
    folder = Path(load_dir) / tag
    if (folder / MANIFEST).is_file():
        saved = (read_manifest(folder) or {}).get("optimizer", _UNNAMED)
        raise CheckpointError(
            f"{folder} was saved by {saved}, this run's optimizer is {engine.optimizer_name()}, which can make nothing "
            f'of its state. Set "type": "{saved}", or load the weights alone, with '
            "load_checkpoint(..., load_optimizer_states=False)"
        )


def check_state(engine, mofa: MatrixOptimizer, load_dir: str, tag: str) -> None:
    """Refuse, on every rank alike, a state of the matrices that is not theirs. Collective.

    DeepSpeed loads the weights and AdamW's part before, and rank 0 alone has the matrices': a tensor that is missing
    there would leave half a run and waiting ranks.
    """
    problem = None
    if dist.get_rank() == 0:
        zero = engine.zero_optimization()
        path = Path(load_dir) / tag / _names(engine, load_dir, tag)[-_world(engine) if zero else 0]
        try:
            # As DeepSpeed will load it in a moment, which runs what it holds.
            whole = load(path, trusted=True)["optimizer_state_dict" if zero else "optimizer"]
            state = whole.get("mofasgd") if isinstance(whole, Mapping) else None
            groups = whole.get("matrix_groups") if isinstance(whole, Mapping) else None
            if isinstance(state, Mapping) and "groups" in state:  # a mixin's, around it
                groups, state = state["groups"], state.get("matrices")
            problem = misfit(state, mofa.split.matrices, mofa.matrices.rule)
            problem = problem or (_groups_misfit(groups, mofa) if groups else None)
            problem = problem and f"{path}: {problem}"
        except (KeyError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            problem = f"{path} is no state of DeepSpeed's ({type(error).__name__}: {error})"
    agree(problem)


def _groups_misfit(groups: list[dict[str, Any]], mofa: MatrixOptimizer) -> str | None:
    try:
        mofa.check_group_settings(groups)
    except ValueError as error:
        return str(error)
    return None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if folder.is_dir():
            return None
        raise CheckpointError(f"{folder}: there is no such checkpoint. {_whole_ones(folder.parent)}") from None
    try:
        manifest = json.loads(content)
        checksum = manifest.pop("checksum")
        whole = checksum == _checksum(manifest)
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is damaged. {_whole_ones(folder.parent, but=folder)}")
    for what, key, known in (("manifest", "format", FORMAT), ("MoFaSGD state", "state_format", STATE_FORMAT)):
        if manifest.get(key) != known:
            raise CheckpointError(
                f"{path}: the {what} is of format {manifest.get(key, 'none')}, this version reads {known}. Load the "
                "checkpoint with the version that wrote it"
            )
    lacking = sorted(_ENTRIES - manifest.keys())
    if lacking:
        raise CheckpointError(f"{path} says nothing of {lacking[0]}: ds_mofa has not written it like this")
    for name in manifest["files"]:
        if not _inside(folder, name):
            raise CheckpointError(
                f"{path} names {name!r}, which is outside of its folder: ds_mofa writes no such manifest, so do not "
                "use this checkpoint"
            )
    return manifest


def _inside(folder: Path, name: str) -> bool:
    """Of the name alone: a link in the folder, which the user made, may lead where the space is."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and name not in ("", ".")


def load(path: Path | str, *, mmap: bool = True, trusted: bool = False) -> Any:
    """A file of DeepSpeed's, on the CPU, without running what its pickle says.

    Args:
        mmap: must be off where the file itself is written anew.
        trusted: run it.

    Raises:
        CheckpointError: it holds objects that are neither torch's safe ones nor DeepSpeed's own.
    """
    if trusted:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=False)
    try:
        with torch.serialization.safe_globals(_OF_DEEPSPEED):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects beside tensors that only running code from it would make ({_unsafe(path, error)}). "
            "They are of its client_state, if it is your own: leave them out there, or, where you trust who wrote it, "
            "convert it with --trust"
        ) from None


def _unsafe(path: Path | str, error: Exception) -> str:
    try:
        with torch.serialization.safe_globals(_OF_DEEPSPEED):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a file that is made to be misread
        names = []
    return ", ".join(sorted(names)) or str(error).splitlines()[0]


def check(folder: Path, manifest: Mapping[str, Any] | None, share: int = 0, shares: int = 1) -> None:
    """Compare files with the manifest and with their own checksums; without a manifest, every .pt file with its own.

    Args:
        share, shares: look at the contents of each ``shares``-th file alone, from number ``share`` on.

    Raises:
        CheckpointError: the first file that is missing, of another size, or damaged.
    """
    files: Mapping[str, Mapping[str, Any]]
    if manifest is None:
        files = {str(path.relative_to(folder)): {} for path in folder.rglob("*.pt")}
        records = True
    else:
        files, records = manifest["files"], manifest["crc32"]
    sizes: dict[str, int] = {}
    for name, written in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None or written.get("bytes", size) != size:
            what = "is missing" if size is None else f"has {size} bytes, {written['bytes']} were written"
            raise CheckpointError(f"{path} {what}. {_whole_ones(folder.parent, but=folder)}")
        sizes[name] = size
    for name in sorted(files, key=lambda name: (-sizes[name], name))[share::shares]:
        damage = damage_of(folder / name, records, **files[name])
        if damage:
            raise CheckpointError(f"{folder / name} is damaged ({damage}). {_whole_ones(folder.parent, but=folder)}")


def damage_of(path: Path, records: bool = True, directory: int | None = 0, **_) -> str | None:
    """What is wrong with a file of ``torch.save``.

    Args:
        records: read every record and compare it with its checksum; else the directory alone.
        directory: its checksum when it was written; None for a file that has none, 0 for one that is not known.
    """
    if directory is None:
        return None
    try:
        if directory and _directory_checksum(path) != directory:
            return "the directory at its end is not the one that was written"
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip() if records else None
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError, RuntimeError, zlib.error) as error:
        return str(error) or type(error).__name__
    return None if record is None else f"the checksum of {record} is wrong"


def agree(problem: str | None) -> None:
    """Raise on every rank if any has a problem: the first one's. Collective."""
    problems = [problem]
    if dist.get_world_size() > 1:
        problems *= dist.get_world_size()
        dist.all_gather_object(problems, problem)
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise CheckpointError(first)


def _check_place(engine, folder: Path, manifest: Mapping[str, Any] | None, with_state: bool) -> None:
    """Whether DeepSpeed can load this layout of files into this engine."""
    convert = CONVERT.format(folder, folder)
    universal = (folder / "zero").is_dir()
    if engine.load_universal_checkpoint():
        stage3 = bool(list(folder.glob("zero_pp_rank_0_mp_rank_*_model_states.pt")))
        if not universal:
            raise CheckpointError(
                f'{folder} is no universal checkpoint, and the config says "load_universal": make one with\n  {convert}'
            )
        if stage3 != engine.zero_optimization_partition_weights() and manifest is None:
            raise CheckpointError(
                f"{folder} was converted by DeepSpeed's ds_to_universal from {_stages(stage3)}, and what it writes "
                f"does not load into {_stages(not stage3)}. Convert the original checkpoint for all stages, with\n"
                f"  {CONVERT.format('CHECKPOINT', 'CHECKPOINT')}"
            )
        return
    if universal:
        raise CheckpointError(
            f'{folder} is a universal checkpoint: to load it, set "checkpoint": {{"load_universal": true}} in the '
            "DeepSpeed config"
        )
    if manifest is None:
        return
    stage, stages = int(engine.zero_optimization_stage()), (0, 1, 1, 3)  # 1 and 2 write the same
    way_out = (
        f'convert it with\n  {convert}\nand set "checkpoint": {{"load_universal": true}} in the DeepSpeed config'
        if stage and manifest["zero_stage"]
        else "start from its weights alone, as save_16bit_model writes them (stage 0 has no universal checkpoints; "
        "stage 1 has, and on one rank it is the same training)"
    )
    if stages[stage] != stages[manifest["zero_stage"]]:
        raise CheckpointError(
            f"{folder} was saved at ZeRO stage {manifest['zero_stage']}, this run is at stage {stage}. To resume it, "
            f"{way_out}"
        )
    sharded = stage == 3 or (stage > 0 and with_state)
    if sharded and manifest["world_size"] != engine.seq_dp_world_size:
        raise CheckpointError(
            f"{folder} was saved by {manifest['world_size']} data-parallel ranks, this run has "
            f"{engine.seq_dp_world_size}. To resume it, {way_out}"
        )


def _check_optimizer(folder: Path, manifest: Mapping[str, Any], mofa: MatrixOptimizer) -> None:
    saved, title = manifest.get("optimizer", _UNNAMED), mofa.options.title
    if saved != title:
        raise CheckpointError(
            f"{folder} was saved by {saved}, this run's optimizer is {title}, which can make nothing of its state. Set "
            f'"type": "{saved}", or load the weights alone, with load_checkpoint(..., load_optimizer_states=False)'
        )
    if manifest["rank"] != mofa.options.rank:
        try:
            mofa.matrices.rule.resized([], {manifest["rank"]})
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None


def _check_matrices(folder: Path, manifest: Mapping[str, Any], mofa: MatrixOptimizer) -> None:
    saved = {name: tuple(shape) for name, shape in manifest["matrices"].items()}
    here = {matrix.name: matrix.full_shape for matrix in mofa.split.matrices}
    odd = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
    if odd:
        raise CheckpointError(
            f"{folder}: the checkpoint's matrices are not this run's: {len(odd)} differ, such as {odd[0]!r}, there "
            f"{saved.get(odd[0], 'none')}, here {here.get(odd[0], 'none')}. Use the model, include and exclude that it "
            "was saved with, and a rank that fits the same matrices"
        )


def _check_adamw_states(folder: Path, manifest: Mapping[str, Any], mofa: MatrixOptimizer) -> None:
    saved, here = manifest.get("adamw_states", "full"), mofa.options.adamw_states  # older manifests have no entry
    if saved != here:
        raise CheckpointError(
            f"{folder} was saved with adamw_states='{saved}', this run has '{here}': set adamw_states='{saved}', or start "
            "from its weights alone, with load_optimizer_states=False"
        )


def _check_precision(folder: Path, manifest: Mapping[str, Any], wanted: list[str]) -> None:
    """DeepSpeed names its files by it."""
    lacking = [name for name in wanted if name not in manifest["files"]]
    if lacking:
        raise CheckpointError(
            f"{folder} was saved in another precision (bf16 or not) than this run's, which looks for {lacking[0]}. Use "
            f"the one that it was saved with, or convert it with\n  {CONVERT.format(folder, folder)}\n"
            'and set "checkpoint": {"load_universal": true} in the DeepSpeed config'
        )


def _stages(stage3: bool) -> str:
    return "ZeRO stage 3" if stage3 else "ZeRO stages 1 and 2"


def _without_manifest(folder: Path) -> str:
    return (
        f"{folder} has no {MANIFEST}: its save was interrupted, or another optimizer wrote it (whose weights alone can "
        f"be loaded, with load_optimizer_states=False). {_whole_ones(folder.parent, but=folder)}"
    )


def _whole_ones(directory: Path, but: Path | None = None) -> str:
    """Where else to go on from."""
    found = []
    with contextlib.suppress(OSError):
        found = sorted((path.parent for path in directory.glob(f"*/{MANIFEST}")), key=lambda p: p.stat().st_mtime)
    names = [path.name for path in found if path != but]
    if not names:
        return f"No other checkpoint is in {directory}: restore it from a copy"
    return f"Resume from another one, by its tag; {directory} has {', '.join(names[-5:])}"
