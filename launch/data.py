"""Training and evaluation data as tokenized ``datasets.Dataset``s, cached on disk by their content."""

from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from launch.arguments import DataArguments
from launch.encoding import Encoder
from launch.errors import UserError
from launch.examples import encoded_records
from launch.records import checked_record


def load_data(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, block_length: int | None
) -> tuple[Dataset, Dataset | None]:
    """Load what the arguments name.

    Args:
        block_length: tokens in a block of a .txt file; records are kept whole.

    Returns:
        (train, eval), eval None where there is none; columns "input_ids" and "labels".
    """
    if args.dataset_name:
        train = from_hub(args, args.dataset_train_split, tokenizer)
        return train, from_hub(args, args.dataset_eval_split, tokenizer) if args.dataset_eval_split else None
    train = from_files(args.train_file, args.ignore_keys, tokenizer, block_length)
    return train, from_files(args.eval_file, args.ignore_keys, tokenizer, block_length) if args.eval_file else None


def from_files(
    paths: list[str], ignore_keys: list[str], tokenizer: PreTrainedTokenizerBase, block_length: int | None
) -> Dataset:
    """Read, check and encode files."""
    try:
        return Dataset.from_generator(
            encoded_records,
            gen_kwargs={
                # Tuples: the library would take lists for shards to be read in parallel.
                "paths": tuple(paths),
                "ignore_keys": tuple(ignore_keys),
                "tokenizer": tokenizer,
                "block_length": block_length,
                "stamps": tuple(file_stamp(path) for path in paths),
            },
        )
    except DatasetGenerationError as error:
        # The library wraps whatever reading raises; the user should see the message with the file and the line.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def file_stamp(path: str) -> tuple[int, int] | None:
    """Size in bytes and time of last change in ns, or None for a missing file, which reading complains about."""
    file = Path(path)
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None


def from_hub(args: DataArguments, split: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Load one split of a dataset by name, and check and encode its rows."""
    try:
        rows = load_dataset(args.dataset_name, args.dataset_config, split=split)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{args.dataset_name}: split {split!r} could not be loaded ({error}). Check --dataset_name, "
            "--dataset_config, the split's name and the network; local files go to --train_file."
        ) from error
    encoder, ignored = Encoder(tokenizer), frozenset(args.ignore_keys)

    def encode(row: dict, index: int) -> dict[str, list[int]]:
        where = f"{args.dataset_name}[{split}] row {index}"
        return encoder(*checked_record(dict(row), where, ignored), where)

    return rows.map(encode, with_indices=True, remove_columns=rows.column_names, desc=f"Tokenizing {split}")
