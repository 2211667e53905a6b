"""What one value may be: each check raises an error that names the option, its value, and what would be right."""

import dataclasses
import itertools
import math
import re
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["Checked", "OptionError", "check_flag", "check_integer", "check_number", "check_pair", "check_patterns"]

_LARGEST = 10**300


class OptionError(ValueError):
    """An option that cannot be right; the message names it, its value, and what would be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """The root of every class of options. Each class checks its own in ``__post_init__``, and then calls ``super()``'s.

    Options whose type is a ``Literal`` of strings are checked here.
    """

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            choices, value = _choices(hint), getattr(self, name)
            if choices and value not in choices:
                raise OptionError(f"{name}={value!r} must be one of {', '.join(map(repr, filter(None, choices)))}")


def _choices(hint: Any) -> tuple[str | None, ...]:
    """What a ``Literal`` of strings, or None beside one, lets an option be; empty for every other type."""
    parts = get_args(hint)
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        of_parts = [(None,) if part is type(None) else _choices(part) for part in parts]
        return tuple(itertools.chain.from_iterable(of_parts)) if all(of_parts) else ()
    return parts if get_origin(hint) is Literal and all(isinstance(part, str) for part in parts) else ()


def check_number(name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """Raise an OptionError unless low <= value < high, or low < value < high."""
    bounds = f"{'>' if open_low else '>='} {low}" + (f" and < {high}" if high < math.inf else "")
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise OptionError(f"{name}={value!r} must be a number {bounds}")
    if isinstance(value, int) and abs(value) > _LARGEST:  # JSON has integers of any size, arithmetic has not
        raise OptionError(f"{name} has {len(str(abs(value)))} digits and must be a number {bounds}")
    if not (low < value if open_low else low <= value) or not value < high:
        raise OptionError(f"{name}={value!r} must be {bounds}")


def check_integer(name: str, value: Any, *, low: int, high: int) -> None:
    """Raise an OptionError unless value is an int, low <= value < high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
        raise OptionError(f"{name}={value!r} must be a whole number >= {low} and < {high}")


def check_flag(name: str, value: Any) -> None:
    """Raise an OptionError unless value is True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r} must be true or false")


def check_pair(name: str, values: Any, *, low: float, high: float) -> None:
    """Raise an OptionError unless values are two numbers, low <= each < high; Adam's decay rates, for example."""
    if not _is_list(values) or len(values) != 2:
        raise OptionError(f"{name}={values!r} must be two numbers, such as [0.9, 0.999]")
    for value in values:
        check_number(name, value, low=low, high=high)


def check_patterns(name: str, patterns: Any) -> None:
    """Raise an OptionError unless patterns are a list of regular expressions."""
    if not _is_list(patterns) or not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError(f'{name}={patterns!r} must be a list of regular expressions, such as ["lm_head"]')
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:  # the last two: counts and nesting without end
            raise OptionError(f"{name}: {pattern!r} is not a regular expression ({error})") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
