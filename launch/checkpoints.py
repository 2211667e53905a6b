"""Which checkpoint to go on from, and which folders are whole checkpoints.

A checkpoint is many files by many ranks. When all have written theirs, rank 0 adds a *seal*: a list of the files and
their sizes. A folder without one, or with a file that is missing or of another size, was left half-written by a run
that died, and is never resumed from.
"""

import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ds_mofa.deepspeed.checkpoints import write_atomically
from launch.errors import UserError

LAST = "last"
SEAL = "complete.json"


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
    if not (Path(asked) / "trainer_state.json").is_file() or not list(Path(asked).glob("global_step*")):
        raise UserError(
            f"{asked}: not a checkpoint of this command, which holds trainer_state.json and a global_step folder. "
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


def last_whole(output_dir: str) -> str:
    """The newest whole checkpoint; says which newer folders it has passed over."""
    for folder in reversed(checkpoints_in(output_dir)):
        problem = what_is_missing(folder)
        if problem is None:
            return str(folder)
        if os.environ.get("RANK", "0") == "0":
            print(f"passed over {folder}, which is not whole: {problem}", flush=True)
    raise UserError(
        f"{output_dir}: no checkpoint to resume from. Checkpoints are written with --save_strategy steps or epoch, and "
        "on SIGTERM; without --resume_from_checkpoint the run starts anew."
    )


def checkpoints_in(output_dir: str) -> list[Path]:
    """The folders named checkpoint-N, by N."""
    numbered = (
        (folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"), folder)
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    )
    return [folder for _, folder in sorted((int(number), folder) for number, folder in numbered if number.isdigit())]


def seal(folder: str | Path) -> None:
    """Declare a checkpoint whole. One rank calls it, once all have written."""
    folder = Path(folder)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_atomically(folder / SEAL, json.dumps(sizes, indent=1).encode())  # there is no half a seal


def unseal(folder: str | Path) -> None:
    """Before a checkpoint is written over."""
    (Path(folder) / SEAL).unlink(missing_ok=True)


def what_is_missing(folder: str | Path) -> str | None:
    """Why a folder is no whole checkpoint; None if it is one."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / SEAL).read_text())
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


def remove_old(output_dir: str, keep: int | None, best: str | None = None) -> None:
    """Leave the ``keep`` newest whole checkpoints, and the best one; half-written ones do not count and are left."""
    if keep is None or keep <= 0:
        return
    whole = [folder for folder in checkpoints_in(output_dir) if what_is_missing(folder) is None]
    for folder in sorted(whole, key=lambda folder: (folder / SEAL).stat().st_mtime_ns)[:-keep]:
        if best is None or folder.resolve() != Path(best).resolve():
            shutil.rmtree(folder)
