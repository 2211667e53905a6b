"""Training and evaluation data as tokenized ``datasets.Dataset``s, cached on disk by their content."""

from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from transformers import PreTrainedTokenizerBase

from launch.arguments import DataArguments
from launch.cache_key import combined_key, encoding_key
from launch.encoding import Encoder
from launch.errors import UserError
from launch.examples import encoded_records
from launch.records import checked_record
from launch.rows import without_filled_in


def load_data(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, block_length: int | None
) -> tuple[Dataset, Dataset | None]:
    """Load what the arguments name.

    Args:
        block_length: tokens in a block of a .txt file; records are kept whole.

    Returns:
        (train, eval), eval None where there is none; columns "input_ids" and "labels".
    """
    key = encoding_key(tokenizer)  # once, for a tokenizer's state may change with its use
    if args.dataset_name:
        train = from_hub(args, args.dataset_train_split, tokenizer, key)
        return train, from_hub(args, args.dataset_eval_split, tokenizer, key) if args.dataset_eval_split else None
    options = (args.ignore_keys, tokenizer, block_length, args.answers_only, key)
    return from_files(args.train_file, *options), from_files(args.eval_file, *options) if args.eval_file else None


def from_files(
    paths: list[str],
    ignore_keys: list[str],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int | None,
    answers_only: bool = False,
    key: str | None = None,
) -> Dataset:
    """Read, check and encode files; ``key`` is the tokenizer's ``encoding_key``."""
    options = {
        # Tuples: the library would take lists for shards to be read in parallel.
        "paths": tuple(paths),
        "ignore_keys": tuple(ignore_keys),
        "block_length": block_length,
        "answers_only": answers_only,
    }
    stamps = tuple(file_stamp(path) for path in paths)
    try:
        # The library's own fingerprint would take the code for the same as long as its names are.
        return Dataset.from_generator(
            encoded_records,
            gen_kwargs={**options, "tokenizer": tokenizer},
            fingerprint=combined_key(key or encoding_key(tokenizer), sorted(options.items()), stamps),
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


def from_hub(args: DataArguments, split: str, tokenizer: PreTrainedTokenizerBase, key: str) -> Dataset:
    """Load one split of a dataset by name, and check and encode its rows."""
    try:
        rows = load_dataset(args.dataset_name, args.dataset_config, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error.__cause__ or error) if isinstance(error, DatasetGenerationError) else str(error)
        raise UserError(
            f"{args.dataset_name}: split {split!r} could not be loaded ({' '.join(reason.split())}). Check "
            "--dataset_name, --dataset_config, the split's name and the network; local files go to --train_file."
        ) from error
    encoder, ignored = Encoder(tokenizer, args.answers_only), frozenset(args.ignore_keys)

    def encode(row: dict, index: int) -> dict[str, list[int]]:
        where = f"{args.dataset_name}[{split}] row {index}"
        record = {key: without_filled_in(value, rows.features[key]) for key, value in row.items()}
        return encoder(*checked_record(record, where, ignored), where)

    return rows.map(
        encode,
        with_indices=True,
        remove_columns=rows.column_names,
        desc=f"Tokenizing {split}",
        new_fingerprint=combined_key(key, rows._fingerprint, sorted(ignored), args.answers_only),
    )
