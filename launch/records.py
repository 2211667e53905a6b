"""Reading data files: every record is checked, and every complaint names its file and line.

A record is one of five shapes, told apart by its keys:

    {"text": "..."}                                                     a text
    {"prompt": "...", "completion": "..."}                              a prompt and the answer to learn
    {"instruction": "...", "input": "..." (may be left out), "output": "..."}   the same, as Alpaca has it; "system" and
                                                                        "history", a list of [question, answer], may be there
    {"messages": [{"role": "user", "content": "..."}, ...]}             a chat (see conversations.py)
    {"conversations": [{"from": "human", "value": "..."}, ...]}         the same, as ShareGPT has it (see sharegpt.py)

Files are .txt (a text), .jsonl (a record a line), and tables.py's .json, .csv and .parquet.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from launch.conversations import normal_form
from launch.errors import UserError
from launch.json_files import parse, shown
from launch.preferences import chosen_alone, refuse_preferences
from launch.sharegpt import as_chat
from launch.tables import TABLES

# Required keys and optional ones, by shape.
SHAPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "text": (frozenset({"text"}), frozenset()),
    "prompt": (frozenset({"prompt", "completion"}), frozenset()),
    "instruction": (frozenset({"instruction", "output"}), frozenset({"input", "system", "history"})),
    "chat": (frozenset({"messages"}), frozenset({"tools", "loss_mask"})),
    "sharegpt": (frozenset({"conversations"}), frozenset({"system", "tools", "loss_mask"})),
}
ACCEPTED = (
    "accepted: text | prompt, completion | instruction, output, and perhaps input, system, history | messages or "
    "conversations, and perhaps tools, loss_mask"
)
# Texts are read in pieces of about this many characters, so that a large file never lies in memory as a whole.
TEXT_PIECE = 1 << 20


def read_records(path: str, ignore_keys: Iterable[str] = ()) -> Iterator[tuple[str, str, dict]]:
    """Read one file of any kind.

    Yields:
        (where, shape, record): ``where`` is "file:line", ``shape`` a key of ``SHAPES`` or "piece" for a piece of a
        .txt file, whose record also says whether it is the file's "first" and "last" one.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file. Check --train_file and --eval_file (relative to where you run).")
    if file.suffix == ".txt":
        yield from read_text(file)
    elif file.suffix == ".jsonl":
        yield from read_jsonl(file, ignore_keys)
    elif file.suffix in TABLES:
        yield from read_table(file, ignore_keys)
    else:
        raise UserError(
            f"{path}: a data file must end in .txt (a text), .jsonl (one JSON record per line), {', '.join(TABLES)}, not "
            f"'{file.suffix}'. Rename or convert it."
        )


def read_text(file: Path) -> Iterator[tuple[str, str, dict]]:
    """Cut one text into pieces at line ends; the pieces together are the file, character for character."""
    line_number, piece_line, piece, size, first = 0, 1, [], 0, True
    # newline="" keeps \r\n as it is: the model should see the file's own characters.
    with file.open(encoding="utf-8", newline="") as lines:
        try:
            for line in lines:
                line_number += 1
                if size and size + len(line) > TEXT_PIECE:
                    yield f"{file}:{piece_line}", "piece", {"text": "".join(piece), "first": first, "last": False}
                    piece_line, piece, size, first = line_number, [], 0, False
                piece.append(line)
                size += len(line)
        except UnicodeDecodeError as error:
            # The file is decoded ahead of its lines, so the line is looked up.
            raise UserError(
                f"{file}:{undecodable_line(file)}: not UTF-8 ({error.reason}). Convert it to UTF-8."
            ) from None
    text = "".join(piece)
    if first and not text.strip():
        raise UserError(f"{file}: the file is empty. Give a file with text in it.")
    yield f"{file}:{piece_line}", "piece", {"text": text, "first": first, "last": True}


def undecodable_line(file: Path) -> int:
    """Number of the first line that is not UTF-8."""
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number


def read_jsonl(file: Path, ignore_keys: Iterable[str]) -> Iterator[tuple[str, str, dict]]:
    """Read one JSON record per line; blank lines are skipped."""
    ignored, found = frozenset(ignore_keys), False
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            where = f"{file}:{number}"
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from None
            record = parse(text, where, "Each line must be one whole record.")
            found = True
            yield where, *checked_record(record, where, ignored)
    if not found:
        raise UserError(f"{file}: the file holds no record. Give one JSON record per line; {ACCEPTED}.")


def read_table(file: Path, ignore_keys: Iterable[str]) -> Iterator[tuple[str, str, dict]]:
    """Read the records of a file that is one of ``TABLES``."""
    ignored, found = frozenset(ignore_keys), False
    for where, record in TABLES[file.suffix](file):
        found = True
        yield where, *checked_record(record, where, ignored)
    if not found:
        raise UserError(f"{file}: the file holds no record; {ACCEPTED}.")


def checked_record(record: object, where: str, ignored: frozenset[str] = frozenset()) -> tuple[str, dict]:
    """Check one record.

    Args:
        record: what was read.
        where: "file:line", or a dataset's name and row, for the messages.
        ignored: keys to leave out.

    Returns:
        (shape, record) with the ignored keys gone, and a chat in its normal form.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record must be a JSON object {{...}}, not a {type(record).__name__}; {ACCEPTED}.")
    record = {key: value for key, value in record.items() if key not in ignored}
    refuse_preferences(record, where)
    if "chosen" in record:
        record = chosen_alone(record, where)
    shapes = [shape for shape, (required, _) in SHAPES.items() if required <= record.keys()]
    if len(shapes) != 1:
        problem = "fits no known shape" if not shapes else f"fits several shapes ({', '.join(shapes)})"
        raise UserError(
            f"{where}: the record has keys {sorted(record)} and {problem}; {ACCEPTED}. Rename the keys, or name those "
            "to leave out with --ignore_keys."
        )
    shape = shapes[0]
    required, optional = SHAPES[shape]
    unknown = sorted(record.keys() - required - optional)
    if unknown:
        raise UserError(
            f"{where}: unknown keys {unknown} beside {sorted(required)}; {ACCEPTED}. Remove them, or pass "
            f"--ignore_keys {' '.join(unknown)}."
        )
    if shape == "sharegpt":
        shape, record = "chat", as_chat(record, where)
    if shape == "chat":
        record = normal_form(record, where, ignored)
    elif shape == "instruction":
        record = checked_instruction(record, where)
    else:
        check_strings(record, where)
    check_characters(record, where)
    return shape, record


def check_characters(value: object, where: str) -> None:
    """Every string in it is text: JSON may hold half of a surrogate pair, which no encoding can write."""
    if isinstance(value, dict):
        for key, entry in value.items():
            check_characters(key, where)
            check_characters(entry, where)
    elif isinstance(value, list):
        for entry in value:
            check_characters(entry, where)
    elif isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])
            raise UserError(
                f"{where}: half of a surrogate pair, {half}, stands alone, which is no character. Text was cut in the "
                "middle of an emoji or the like: write the whole pair, or remove the half."
            ) from None


def checked_instruction(record: dict, where: str) -> dict:
    """An instruction without what is empty of its optional keys, all checked."""
    record = {
        key: value for key, value in record.items() if value not in (None, "", []) or key in ("instruction", "output")
    }
    history = record.pop("history", [])
    check_strings(record, where)
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(words, str) and words for words in turn):
            raise UserError(f"{where}: 'history' must be a list of [question, answer], not {shown(history)}.")
    return {**record, "history": history} if history else record


def check_strings(record: dict, where: str) -> None:
    """Every value is a string that says something."""
    for key, value in record.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: {key!r} must be a string, not {shown(value)}. Correct the record.")
        if not value:
            raise UserError(f"{where}: {key!r} is empty, so there is nothing to learn. Fill it or remove the record.")
