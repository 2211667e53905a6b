"""The optimizers by name: the table that the DeepSpeed backend, the launcher, the profiler and the experiments read.

A class enters it where it is written, in this package or in any module that is imported before the name is needed:

>>> @register
... class Toy(MatrixOptimizer):
...     options_class = ToyOptions   # its ``title`` is the name
...     rule_class = ToyRule

From then on ``{"type": "Toy"}`` works in a DeepSpeed JSON. ``launch/train.py --plugins toy.py`` imports the file first.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.options import OptimizerOptions, OptionError
from ds_mofa.rules.rule import Rule

__all__ = ["OPTIMIZERS", "Entry", "entry_of", "find", "on_register", "register"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One optimizer.

    Attributes:
        name: as users write it; whatever reads it takes any case, as DeepSpeed does.
        optimizer: the class that users construct.
        options: what it may be given; ``options.from_config`` parses and checks it.
        rule: makes its rule from such options.
        learning_rate: of the matrices, where a user gives none.
    """

    name: str
    optimizer: type[MatrixOptimizer]
    options: type[OptimizerOptions]
    rule: Callable[[Any], Rule]
    learning_rate: float


_entries: dict[str, Entry] = {}
_watchers: list[Callable[[Entry], None]] = []

OPTIMIZERS: Mapping[str, Entry] = MappingProxyType(_entries)
"""All entries by name, in the order of registration; read-only, and it grows with what is registered later."""

Registered = TypeVar("Registered", bound=type[MatrixOptimizer])


def register(optimizer: Registered) -> Registered:
    """Enter a class into :data:`OPTIMIZERS` under its options' ``title``. A decorator.

    Raises:
        ValueError: another class has that name, in whatever case.
    """
    options = optimizer.options_class
    entry = Entry(options.title, optimizer, options, optimizer.rule_class, options.lr)
    taken = find(entry.name)
    if taken is not None:
        raise ValueError(
            f"the optimizer {entry.name!r} cannot be registered: {taken.optimizer.__module__}."
            f"{taken.optimizer.__qualname__} has that name. Give its options another title"
        )
    _entries[entry.name] = entry
    for watcher in _watchers:
        watcher(entry)
    return optimizer


def find(name: object) -> Entry | None:
    """The entry of ``name`` in any case; None where there is none, or where ``name`` is no string."""
    wanted = name.lower() if isinstance(name, str) else None
    return next((entry for entry in _entries.values() if entry.name.lower() == wanted), None)


def entry_of(name: str) -> Entry:
    """The entry of ``name`` in any case.

    Raises:
        OptionError: there is none; it lists those that there are.
    """
    entry = find(name)
    if entry is None:
        close = difflib.get_close_matches(str(name).lower(), [known.lower() for known in _entries], n=1)
        raise OptionError(
            f"there is no optimizer {name!r} in ds_mofa"
            + (f"; did you mean {entry_of(close[0]).name!r}?" if close else ".")
            + f" There are {', '.join(_entries)}"
        )
    return entry


def on_register(watcher: Callable[[Entry], None]) -> None:
    """Have ``watcher`` called with every entry: those that there are, now, and each that comes."""
    for entry in _entries.values():
        watcher(entry)
    _watchers.append(watcher)
