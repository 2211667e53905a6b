"""Which checkpoint to go on from."""

from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from launch.errors import UserError

LAST = "last"


def checkpoint_to_resume(asked: str | None, output_dir: str) -> str | None:
    """The folder that ``--resume_from_checkpoint`` means.

    Args:
        asked: its value: None, a folder, or "last" for the newest checkpoint in ``output_dir``.
    """
    if asked is None:
        return None
    folder = asked
    if asked == LAST:
        folder = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if folder is None:
            raise UserError(
                f"{output_dir}: no checkpoint to resume from. Checkpoints are written with --save_strategy steps or "
                "epoch."
            )
    if not (Path(folder) / "trainer_state.json").is_file() or not list(Path(folder).glob("global_step*")):
        raise UserError(
            f"{folder}: not a checkpoint of this command, which holds trainer_state.json and a global_step folder. "
            f"Give --resume_from_checkpoint an output folder's checkpoint-N, or '{LAST}'; a finished model goes to "
            "--model_name_or_path."
        )
    return folder
