"""Reading JSON: what is wrong with a file is said with its line."""

import json
from pathlib import Path

from launch.errors import UserError


def read_json(path: str, what: str) -> dict:
    """Read a JSON object; ``what`` names its role in the error messages."""
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"{path}: no such file, given as {what}. Pass a path that exists, or to ds-mofa a name that `ds-mofa config` lists."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: unique(pairs, path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {what} is not UTF-8 ({error.reason}). Convert it to UTF-8.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: {what} is not valid JSON ({error.msg}, column {error.colno}). Correct that line."
        ) from None
    except RecursionError:
        raise UserError(f"{path}: {what} is not valid JSON (nested too deeply). Correct it.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: {what} must be a JSON object {{...}}, not a {type(content).__name__}.")
    return content


def parse(text: str, where: str, advice: str = "Correct it.") -> object:
    """Parse JSON text that stands in a place of its own, such as a line of a file, or is a file's whole text.

    Raises:
        UserError: it is not JSON, or an object of it has a key twice; the message begins with ``where``.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=lambda pairs: unique(pairs, where),
            parse_constant=lambda name: refuse_constant(name, where),
        )
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{where}: not valid JSON ({error.msg}, {line}column {error.colno}). {advice}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deeply). {advice}") from None
    except UserError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where}: cannot be read ({error}). Correct it.") from None


def shown(value: object) -> str:
    """A value as JSON, cut short, for a message; what JSON has no form for, such as a date, as Python writes it."""
    return json.dumps(value, default=str)[:60]


def refuse_constant(name: str, where: str) -> None:
    """NaN and Infinity, which Python reads and other readers of JSON do not."""
    raise UserError(f"{where}: not valid JSON ({name} is not a number of JSON). Correct it.")


def unique(pairs: list[tuple[str, object]], path: str) -> dict:
    """An object of a JSON file; of a key given twice, JSON readers drop the first in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = min(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{path}: the key {twice!r} stands twice in one object. Keep one of them.")
    return found
