"""Which checkpoint to go on from, and which folders are whole checkpoints.

A checkpoint is many files by many ranks. When all have written theirs, rank 0 adds a *seal*: a list of the files and
their sizes, and the lineage of the run (:mod:`launch.runs`). A folder without one, or with a file that is missing or of
another size, was left half-written by a run that died, and is never resumed from.
"""

import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ds_mofa.backends.deepspeed.checkpoints import write_atomically
from launch.engines import Engine
from launch.errors import UserError
from launch.runs import Lineage, begin_run, belongs, new_lineage, read_run

LAST = "last"
SEAL = "complete.json"
STATE = "trainer_state.json"

_FILES = {
    Engine.DEEPSPEED: ("global_step*",),
    Engine.FSDP2: ("pytorch_model_fsdp*",),
    Engine.DDP: ("optimizer.pt",),
}


def checkpoint_to_resume(asked: str | None, output_dir: str) -> str | None:
    """The folder that ``--resume_from_checkpoint`` means.

    Args:
        asked: its value: None, a folder, or "last" for the newest whole checkpoint in ``output_dir``.

    Raises:
        UserError: there is none, or the folder is no whole checkpoint.
    """
    if asked is None:
        return None
    if asked == LAST:
        return last_whole(output_dir)
    if not (Path(asked) / STATE).is_file() or written_by(asked) is None:
        raise UserError(
            f"{asked}: not a checkpoint of this command, which holds trainer_state.json and an optimizer's state. "
            f"Give --resume_from_checkpoint an output folder's checkpoint-N, or '{LAST}'; a finished model goes to "
            "--model_name_or_path."
        )
    problem = what_is_missing(asked)
    if problem:
        raise UserError(
            f"{asked}: the checkpoint is not whole: {problem}. Give --resume_from_checkpoint an earlier one, or "
            f"'{LAST}' for the newest that is."
        )
    return asked


def written_by(folder: str | Path) -> Engine | None:
    """Which engine's checkpoint a folder is, by its files: DDP's is also one process's. None for no checkpoint."""
    for engine, files in _FILES.items():
        if any(next(Path(folder).glob(pattern), None) is not None for pattern in files):
            return engine
    return None


def check_written_by(checkpoint: str | None, engine: Engine) -> None:
    """Every engine reads its own checkpoints.

    Raises:
        UserError: another one has written this, so that its optimizer's state would be lost.
    """
    writer = written_by(checkpoint) if checkpoint is not None else None
    own = Engine.DDP if engine is Engine.ONE else engine
    if writer is not None and writer is not own:
        raise UserError(
            f"{checkpoint}: a checkpoint of a run under {writer.value}, and this one is under {engine.value}. Resume it under "
            f"{writer.value}; or start anew from a saved model, with --model_name_or_path."
        )


def last_whole(output_dir: str) -> str:
    """The newest whole checkpoint of the run that was started last in a folder; says which others it has passed over.

    Where no run has left its lineage, in the folder of an older version, the one that was sealed last.
    """
    run = read_run(output_dir)
    folders = checkpoints_in(output_dir)
    for folder in reversed(folders if run else sorted(folders, key=written)):
        problem = what_is_missing(folder)
        if problem is not None:
            problem = f"which is not whole: {problem}"
        elif run and not belongs(lineage_of(folder), step_of(folder), run["lineage"]):
            problem = "which another run has written"
        else:
            return str(folder)
        if os.environ.get("RANK", "0") == "0":
            print(f"passed over {folder}, {problem}", flush=True)
    source = run and run["resumed_from"]
    if source and what_is_missing(source) is None:  # it lies elsewhere, and nothing has been saved since
        return source
    hint = f" Give --resume_from_checkpoint {folders[-1]} to go on from an earlier run's." if folders else ""
    raise UserError(
        f"{output_dir}: no checkpoint to resume from{' of the run that was started last' if run else ''}. Checkpoints "
        "are written with --save_strategy steps or epoch, and on SIGTERM; without --resume_from_checkpoint the run "
        f"starts anew.{hint}"
    )


def checkpoints_in(output_dir: str) -> list[Path]:
    """The folders named checkpoint-N, by N."""
    numbered = (
        (folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"), folder)
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    )
    return [folder for _, folder in sorted((int(number), folder) for number, folder in numbered if number.isdigit())]


def step_of(folder: str | Path) -> int:
    return int(Path(folder).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def written(folder: Path) -> int:
    """When a checkpoint was sealed, in ns; of one without a seal, when it was last touched."""
    file = folder / SEAL
    return (file if file.is_file() else folder).stat().st_mtime_ns


def seal(folder: str | Path, lineage: Lineage | None = None) -> None:
    """Declare a checkpoint whole, and whose it is. One rank calls it, once all have written."""
    folder = Path(folder)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    content = {"lineage": lineage, "files": sizes}
    write_atomically(folder / SEAL, json.dumps(content, indent=1).encode())  # there is no half a seal


def unseal(folder: str | Path) -> None:
    """Before a checkpoint is written over."""
    (Path(folder) / SEAL).unlink(missing_ok=True)


def what_is_missing(folder: str | Path) -> str | None:
    """Why a folder is no whole checkpoint; None if it is one."""
    folder = Path(folder)
    try:
        sizes = _read_seal(folder)["files"]
    except FileNotFoundError:
        return f"it has no {SEAL}, so the run ended while it was written"
    except json.JSONDecodeError:
        return f"its {SEAL} is not valid JSON"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
    return None


def lineage_of(folder: str | Path) -> Lineage | None:
    """The lineage of the run that wrote a whole checkpoint; None of one before there were any."""
    return _read_seal(Path(folder))["lineage"]


def start_run(output_dir: str, checkpoint: str | None) -> tuple[Lineage, str | None]:
    """Declare that a folder is from now on that of the run which resumes ``checkpoint``, or begins anew.

    One rank calls it, once all have decided what to resume.

    Returns:
        Its lineage, and what the user should know of the checkpoints there that are not its own.
    """
    if checkpoint is None:
        lineage = new_lineage()
    else:
        step = json.loads((Path(checkpoint) / STATE).read_text())["global_step"]
        lineage = new_lineage(lineage_of(checkpoint), step)
    begin_run(output_dir, lineage, checkpoint)
    return lineage, describe_others(output_dir, lineage)


def _read_seal(folder: Path) -> dict:
    content = json.loads((folder / SEAL).read_text())
    return content if isinstance(content.get("files"), dict) else {"lineage": None, "files": content}


def is_ours(folder: str | Path, lineage: Lineage) -> bool:
    """Whether a folder is a whole checkpoint of a lineage."""
    return what_is_missing(folder) is None and belongs(lineage_of(folder), step_of(folder), lineage)


def describe_others(output_dir: str, lineage: Lineage) -> str | None:
    """What a run that begins should know of the checkpoints that are not its own; None where there are none."""
    others = [folder.name for folder in checkpoints_in(output_dir) if not is_ours(folder, lineage)]
    if not others:
        return None
    return (
        f"{output_dir} holds checkpoints that are not this run's: {', '.join(others)}. They stay, but for one of a "
        f"step that this run saves too; --save_total_limit does not count them, and --resume_from_checkpoint {LAST} "
        "will not take them."
    )


def remove_old(output_dir: str, keep: int | None, best: str | None = None, lineage: Lineage | None = None) -> None:
    """Leave the ``keep`` newest whole checkpoints of a lineage, and the best one.

    Half-written ones, and those of other runs, do not count and are left. Without a lineage all are one run's.
    """
    if keep is None or keep <= 0:
        return
    whole = [folder for folder in checkpoints_in(output_dir) if what_is_missing(folder) is None]
    if lineage is None:
        whole.sort(key=written)
    else:
        whole = [folder for folder in whole if is_ours(folder, lineage)]
    for folder in whole[:-keep]:
        if best is None or folder.resolve() != Path(best).resolve():
            shutil.rmtree(folder)
