"""YAML without its traps, and checked mappings: a setting that nobody reads must not look as if it were in force."""

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from launch.errors import UserError

__all__ = ["checked", "read_yaml", "unknown"]

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for two things: 1e-3 is a number, and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # << brings what may be given anew
        keys = [self.construct_object(key, deep=True) for key in own]
        for key, key_node in zip(keys, own):
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is given twice", problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a point in a float, and takes 1e-3 for a string.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        UserError: no such file, not YAML, or a key given twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Shipped ones are in experiments/configs/comparisons."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({error}). Correct it.") from None


def checked(cls: type[T], options: Any, where: str) -> T:
    """``cls(**options)`` for a dataclass, after checking names and types against its fields.

    Raises:
        UserError: no mapping, an unknown or missing option, or one of the wrong type.
    """
    if not isinstance(options, Mapping):
        raise UserError(f"{where}: {options!r} must be a mapping of options.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in options:
        if name not in fields:
            raise UserError(unknown(name, fields, f"{where}: no option"))
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in options]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} must be given.")
    hints = get_type_hints(cls)
    for name, value in options.items():
        if not _fits(value, hints[name]):
            raise UserError(f"{where}.{name}: {value!r} must be {_described(hints[name])}.")
    return cls(**options)


def unknown(name: Any, known: Iterable[str], what: str) -> str:
    """The message about a name that does not exist, with what may have been meant."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"{what} {name!r}" + (f"; did you mean {close[0]!r}?" if close else ".") + f" There are {', '.join(known)}."


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if isinstance(hint, type):
        # A whole number is a number, but True is neither.
        return isinstance(value, int | float if hint is float else hint) and (
            hint is bool or not isinstance(value, bool)
        )
    return value in get_args(hint)  # a Literal


def _described(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_described(part) for part in get_args(hint))
    if isinstance(hint, type):
        names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
        return names.get(hint, hint.__name__)
    return "one of " + ", ".join(map(str, get_args(hint)))
