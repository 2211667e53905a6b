"""Reading JSON: what is wrong with a file is said with its line."""

import json
from pathlib import Path

from launch.errors import UserError


def read_json(path: str, what: str) -> dict:
    """Read a JSON object; ``what`` names its role in the error messages."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file, given as {what}. Pass a path that exists (shipped ones: configs/).")
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


def unique(pairs: list[tuple[str, object]], path: str) -> dict:
    """An object of a JSON file; of a key given twice, JSON readers drop the first in silence."""
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise UserError(f"{path}: the key {twice[0]!r} stands twice in one object. Keep one of them.")
    return dict(pairs)
