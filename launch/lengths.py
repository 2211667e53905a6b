"""What --max_length and batches leave of the data, before anything is trained on it."""

import numpy as np
from datasets import Dataset
from torch.utils.data import DataLoader

from launch.arguments import TrainingArguments
from launch.encoding import IGNORED
from launch.errors import UserError
from launch.report import say


def check_lengths(args: TrainingArguments, train_data: Dataset, eval_data: Dataset | None) -> None:
    """Say how many examples lose all of their answers to --max_length, which TRL drops without a word.

    Raises:
        UserError: all of them do.
    """
    truncation = None if args.packing and args.packing_strategy != "bfd" else args.truncation_mode
    if args.packing and truncation:
        truncation = "keep_start"
    for name, data, keep in (("train", train_data, truncation), ("eval", eval_data, args.truncation_mode)):
        if data is None or args.max_length is None or keep is None:
            continue
        lost = answers_lost(data, args.max_length, keep)
        if lost == len(data):
            raise UserError(
                f"{name} data: --max_length {args.max_length} cuts all answers off, in each of the {len(data):,} "
                "examples, so there is nothing to learn. Give a larger --max_length, or shorten the prompts."
            )
        if lost:
            say(
                args,
                f"{name} data: --max_length {args.max_length} cuts all answers off in {lost:,} of {len(data):,} "
                "examples; nothing is learned from these.",
            )


def answers_lost(data: Dataset, length: int, keep: str) -> int:
    """The number of examples without a learned label in their first (``keep_start``) or last ``length`` tokens."""
    lost = 0
    for chunk in data.with_format("arrow").iter(batch_size=1000):
        labels = chunk.column("labels").combine_chunks()
        values, offsets = labels.flatten().to_numpy(), labels.value_lengths().to_numpy().cumsum()
        for row in np.split(values, offsets[:-1]):
            kept = row[:length] if keep == "keep_start" else row[-length:]
            lost += not (kept != IGNORED).any()
    return lost


def check_batches(loader: DataLoader, args: TrainingArguments) -> None:
    """With --dataloader_drop_last an incomplete batch is left out, and a training of no step would end well.

    Raises:
        UserError: it is the only one.
    """
    if len(loader) == 0:
        raise UserError(
            f"--dataloader_drop_last: {len(loader.dataset):,} training examples (rows, where they are packed) are "
            f"fewer than one batch, {args.per_device_train_batch_size} on each of {args.world_size} ranks, so there "
            "would be no step. Leave the option out, lower --per_device_train_batch_size, or give more data."
        )
