"""From files to the examples of a training: blocks of texts, and records as they are."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from launch.encoding import Encoder
from launch.errors import UserError
from launch.records import read_records


def encoded_records(
    paths: tuple[str, ...],
    ignore_keys: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int | None,
    answers_only: bool = False,
) -> Iterator[dict[str, list[int]]]:
    """Generate the examples of files: blocks of texts, and records as they are.

    ``answers_only`` as in ``Encoder``.
    """
    encoder = Encoder(tokenizer, answers_only)
    for path in paths:
        records = read_records(path, ignore_keys)
        if Path(path).suffix == ".txt":
            if block_length is None:
                raise UserError(f"{path}: a text is trained on in blocks, so --max_length must be a number of tokens.")
            if answers_only:
                raise UserError(
                    f"{path}: --assistant_only_loss is for conversations, and this is a text. Leave it out, or give "
                    "records with 'messages'."
                )
            pieces = (encoder(shape, record, where)["input_ids"] for where, shape, record in records)
            for block in blocks(pieces, block_length):
                yield {"input_ids": block, "labels": block}
        else:
            for where, shape, record in records:
                yield encoder(shape, record, where)


def blocks(pieces: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """Cut a stream of token ids into lists of ``length``, the last one shorter; none is lost."""
    rest: list[int] = []
    for piece in pieces:
        rest = rest + piece
        full = len(rest) - len(rest) % length
        for start in range(0, full, length):
            yield rest[start : start + length]
        rest = rest[full:]
    if rest:
        yield rest
