"""The parts of an optimizer step by name, for whoever wants to time them or weigh their memory.

With no listener, a phase costs one look at an empty list.
"""

import contextlib
from collections.abc import Iterator
from typing import Protocol

__all__ = ["Listener", "listening", "phase", "PHASES"]

PHASES = ("capture", "reduce", "factor update", "gather", "apply", "AdamW")


class Listener(Protocol):
    """Told when a phase begins and ends, on the thread that runs it; phases nest."""

    def enter(self, name: str) -> None: ...

    def leave(self, name: str) -> None: ...


_listeners: list[Listener] = []
_NOBODY = contextlib.nullcontext()


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within: ``listener`` hears of every phase of every optimizer in the process."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def phase(name: str) -> contextlib.AbstractContextManager:
    """The context of one phase; ``name`` is one of :data:`PHASES`."""
    return _announced(name) if _listeners else _NOBODY


@contextlib.contextmanager
def _announced(name: str) -> Iterator[None]:
    heard = tuple(_listeners)
    for listener in heard:
        listener.enter(name)
    try:
        yield
    finally:
        for listener in reversed(heard):
            listener.leave(name)
