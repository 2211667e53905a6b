"""Files of records that are not one line each: .json, .csv and .parquet. Every record comes with its place."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.errors import UserError
from launch.json_files import parse
from launch.rows import without_filled_in

__all__ = ["TABLES"]

Record = tuple[str, object]  # where it stands, and what was read

# What a cell of a .csv holds as JSON text, for it holds no list.
JSON_CELLS = ("messages", "conversations", "tools", "loss_mask")
_CELL = 1 << 30  # characters: Python's own limit, 131072, is below a long document's
_ROWS = 1024  # of a .parquet file in memory at a time


def read_json_list(file: Path) -> Iterator[Record]:
    """A list of records, as Alpaca and ShareGPT have it; one record a line is read too, whatever the file's name."""
    text = _decoded(file.read_bytes(), file)
    if text.lstrip().startswith("{"):
        first, rest = text.lstrip().split("\n", 1) if "\n" in text.lstrip() else (text, "")
        if rest.strip() and _is_json(first):
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    yield f"{file}:{number}", parse(line, f"{file}:{number}", "Each line must be one whole record.")
            return
    found = parse(text, str(file), "A .json file is a list of records, [{...}, ...].")
    if isinstance(found, dict):
        raise UserError(
            f"{file}: one object with the keys {sorted(found)[:10]}, and a .json file is a list of records, [{{...}}, ...]. "
            "Write the list alone, or a record a line."
        )
    if not isinstance(found, list):
        raise UserError(f"{file}: a .json file is a list of records, [{{...}}, ...], not {type(found).__name__}.")
    for number, record in enumerate(found, start=1):
        yield f"{file}: record {number}", record


def read_csv(file: Path) -> Iterator[Record]:
    """One record a row under a line of names; messages and the like are JSON text in their cell."""
    csv.field_size_limit(_CELL)
    rows = csv.reader(io.StringIO(_decoded(file.read_bytes(), file), newline=""), strict=True)
    try:
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise UserError(f"{file}:1: a name stands twice in {names}. Rename one.")
        while True:
            where = f"{file}:{rows.line_num + 1}"
            row = next(rows, None)
            if row is None:
                return
            if not row:
                continue
            if len(row) != len(names):
                raise UserError(
                    f"{where}: {len(row)} cells under {len(names)} names ({', '.join(names)}). A cell with a comma or a "
                    "line end in it stands in double quotes."
                )
            yield where, {name: _cell(name, text, where) for name, text in zip(names, row, strict=True)}
    except csv.Error as error:
        raise UserError(f"{file}:{rows.line_num}: not valid CSV ({error}). Correct it.") from None


def _cell(name: str, text: str, where: str) -> object:
    if name not in JSON_CELLS:
        return text
    return parse(text, f"{where}: {name!r}", "The cell is JSON text.") if text.strip() else None


def read_parquet(file: Path) -> Iterator[Record]:
    """One record a row."""
    try:
        import pyarrow
        from datasets import Features
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{file}: reading Parquet needs {error.name}: pip install datasets") from None
    try:
        content = parquet.ParquetFile(file)
        features = Features.from_arrow_schema(content.schema_arrow)
        number = 0
        for batch in content.iter_batches(batch_size=_ROWS):
            for stored in batch.to_pylist():
                row = features.decode_example(stored)
                yield f"{file}: row {number}", {key: without_filled_in(row[key], features[key]) for key in row}
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read as Parquet ({reason}). Write the file anew.") from error


TABLES: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": read_json_list,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def _decoded(raw: bytes, file: Path) -> str:
    """UTF-8 text, without the mark that spreadsheets write before it."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
