"""The folder that a run writes to: whether it can hold what is to come, and what to do when it cannot."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel

from launch.arguments import TrainingArguments
from launch.errors import RankError, UserError
from launch.models import count_parameters, training_dtype


def check_output(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Fail before the first step, not after the last, where the output folder cannot be written.

    Raises:
        UserError: the folder cannot be made or written, or has not even the space for the weights: once for the
            final model, once more where checkpoints are written.
    """
    if args.process_index != 0:
        return
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({os.strerror(error.errno)}). Give --output_dir another folder."
        ) from error
    copies = 1 if args.save_strategy == "no" else 2
    needed = copies * count_parameters(model) * training_dtype(args).itemsize
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB free, and the weights alone take {needed / 1e9:.2f} GB "
            f"({'final model and one checkpoint' if copies > 1 else 'final model'}). Free some, or give --output_dir "
            "another disk."
        )


@contextmanager
def writing(folder: str, what: str) -> Iterator[None]:
    """Within: a full disk or a failed write is an error that says what was being written, and how to go on.

    Raises:
        RankError: instead of what the libraries raise.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if type(error) is RuntimeError:  # PyTorch's writer has lost the system's reason, and much else raises it too
            if "inline_container" not in reason:
                raise
            reason = "a file was cut short"
        raise RankError(
            f"{folder}: {what} could not be written ({reason}; {shutil.disk_usage(folder).free / 1e9:.2f} GB free). "
            "Check the disk's space and limits, then start the same command with --resume_from_checkpoint last."
        ) from error
