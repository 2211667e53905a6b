"""Who trains a matrix: one optimizer at a time. The one built last takes over, by name, and the earlier one may not step.

A parameter knows nothing of this: what stands on it would be pickled, copied and saved with the model.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Claim", "LostError", "claim", "on_claim", "release", "wait_for_step", "wait_no_more", "waiting"]

logger = logging.getLogger("ds_mofa")

_claims: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()  # parameter -> weak reference to the claim on it
_waiting: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()  # parameter -> options of a plain optimizer
_watchers: list[Callable[[Iterable[nn.Parameter], str], None]] = []


class LostError(RuntimeError):
    """An optimizer was asked to step after another one had taken its matrices over."""


class Claim:
    """One optimizer's hold on its matrices.

    Attributes:
        title: of the optimizer.
        names: of its matrices.
    """

    def __init__(self, title: str, names: list[str], let_go: Callable[[], None]):
        self.title, self.names = title, names
        self._let_go: Callable[[], None] | None = let_go
        self._lost_to: str | None = None
        self.params: list[weakref.ref] = []  # where an optimizer waits for its first step

    @property
    def held(self) -> bool:
        return self._let_go is not None

    def check(self) -> None:
        """Raise a LostError where another optimizer has taken over."""
        if self._lost_to is not None:
            raise LostError(
                f"this {self.title} trains nothing any more: {self._lost_to} was built later over some of the same "
                f"parameters ({self.names[0]!r}, ...). Step the later one, and give every parameter to one optimizer; to "
                f"go back to this one build a new {self.title} and load this one's state_dict()"
            )
        self._wait_no_more()

    def give_up(self) -> None:
        """End it, by the optimizer's own wish."""
        self._let_go = None
        self._wait_no_more()

    def lose(self, to: str) -> None:
        """End it, because ``to`` takes over: the optimizer lets go of the model, and is told when it steps next."""
        if self._let_go is None:
            return
        let_go, self._let_go, self._lost_to = self._let_go, None, to
        self._wait_no_more()
        logger.warning("ds_mofa: %s takes over the matrices of a %s that was built before", to, self.title)
        let_go()

    def _wait_no_more(self) -> None:
        if self.params:
            params = [reference() for reference in self.params]
            wait_no_more(param for param in params if param is not None)
            self.params = []


def claim(title: str, matrices: Mapping[nn.Parameter, str], let_go: Callable[[], None]) -> Claim:
    """Claim parameters for an optimizer, from whichever had them.

    Args:
        title: of the optimizer.
        matrices: parameters with their names.
        let_go: puts the model back as it was before the optimizer; it must not keep the optimizer alive.
    """
    release(matrices, to=f"another {title}")
    for watcher in _watchers:
        watcher(matrices, f"another {title}")
    own = Claim(title, list(matrices.values()), let_go)
    for param in matrices:
        _claims[param] = weakref.ref(own)
    return own


def release(params: Iterable[nn.Parameter], to: str) -> None:
    """Have every optimizer that holds one of ``params`` let go of all that it holds.

    Args:
        to: who takes over, for the messages.
    """
    for param in params:
        reference = _claims.get(param)
        holder = reference() if reference is not None else None
        if holder is not None:
            holder.lose(to)


def on_claim(watcher: Callable[[Iterable[nn.Parameter], str], None]) -> None:
    """Have every :func:`claim` call it with the parameters and the claimant: a backend's engines make room as well."""
    _watchers.append(watcher)


def wait_for_step(params: Iterable[nn.Parameter], options: Any) -> None:
    """Remember that an optimizer was built over parameters that it has claimed, until it steps, loses them or gives up.

    It is remembered when the optimizer is gone, which is how a framework that drops it in silence is found out.
    """
    params = list(params)
    wait_no_more(params)
    holder = _claims[params[0]]()
    holder.params = [weakref.ref(param) for param in params]
    for param in params:
        _waiting[param] = options


def waiting(params: Iterable[nn.Parameter]) -> Any | None:
    """The options of an optimizer that waits for its first step on one of ``params``."""
    return next((_waiting[param] for param in params if param in _waiting), None)


def wait_no_more(params: Iterable[nn.Parameter]) -> None:
    for param in params:
        _waiting.pop(param, None)
