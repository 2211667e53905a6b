"""Who trains a matrix: one optimizer at a time. The one built last takes over, by name, and the earlier one may not step.

A parameter knows nothing of this: what stands on it would be pickled, copied and saved with the model, and a weak reference
to it would keep torch from swapping it (``torch.utils.swap_tensors``).
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

__all__ = ["Claim", "LostError", "claim", "on_claim", "release", "wait_for_step", "wait_no_more", "waiting"]

logger = logging.getLogger("ds_mofa")

# By the id of a parameter, which a claim that is held keeps alive.
_claims: "weakref.WeakValueDictionary[int, Claim]" = weakref.WeakValueDictionary()
# By the id of a parameter: a module that holds it, and the options of a plain optimizer that has not stepped.
_waiting: dict[int, tuple[weakref.ref, Any]] = {}
_watchers: list[Callable[[Iterable[nn.Parameter], str], None]] = []


class LostError(RuntimeError):
    """An optimizer was asked to step after another one had taken its matrices over."""


class Claim:
    """One optimizer's hold on its matrices.

    Attributes:
        title: of the optimizer.
        names: of its matrices.
        params: the matrices; none when it has ended.
    """

    def __init__(self, title: str, matrices: Mapping[nn.Parameter, str], let_go: Callable[[], None]):
        self.title, self.names = title, list(matrices.values())
        self.params = list(matrices)
        self._let_go: Callable[[], None] | None = let_go
        self._lost_to: str | None = None
        self._waits = False

    @property
    def held(self) -> bool:
        return self._let_go is not None

    def check(self) -> None:
        """Before a step: raise a LostError where another optimizer has taken over."""
        if self._lost_to is not None:
            raise LostError(
                f"this {self.title} trains nothing any more: {self._lost_to} was built later over some of the same "
                f"parameters ({self.names[0]!r}, ...). Step the later one, and give every parameter to one optimizer; to "
                f"go back to this one build a new {self.title} and load this one's state_dict()"
            )
        self._wait_no_more()

    def give_up(self) -> None:
        """End it, by the optimizer's own wish."""
        self._end()

    def lose(self, to: str) -> None:
        """End it, because ``to`` takes over: the optimizer lets go of the model, and is told when it steps next."""
        if self._let_go is None:
            return
        let_go, self._lost_to = self._let_go, to
        self._end()
        logger.warning("ds_mofa: %s takes over the matrices of a %s that was built before", to, self.title)
        let_go()

    def wait(self) -> None:
        """See :func:`wait_for_step`."""
        self._waits = True

    def _end(self) -> None:
        self._wait_no_more()
        self._let_go, self.params = None, []

    def _wait_no_more(self) -> None:
        if self._waits:
            wait_no_more(self.params)
        self._waits = False


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
    own = Claim(title, matrices, let_go)
    for param in matrices:
        _claims[id(param)] = own
    return own


def release(params: Iterable[nn.Parameter], to: str) -> None:
    """Have every optimizer that holds one of ``params`` let go of all that it holds.

    Args:
        to: who takes over, for the messages.
    """
    for param in params:
        holder = _claims.get(id(param))
        if holder is not None:
            holder.lose(to)


def on_claim(watcher: Callable[[Iterable[nn.Parameter], str], None]) -> None:
    """Have every :func:`claim` call it with the parameters and the claimant: a backend's engines make room as well."""
    _watchers.append(watcher)


def wait_for_step(own: Claim | None, holders: Mapping[nn.Parameter, nn.Module], options: Any) -> None:
    """Remember that an optimizer was built over parameters until it steps, loses them or gives up.

    It is remembered when the optimizer is gone, which is how a framework that drops it in silence is found out.

    Args:
        own: its claim; None where it has none yet.
        holders: a module that holds each parameter; when the module is gone, so is the memory.
        options: of the optimizer.
    """
    for key in [key for key, (module, _) in _waiting.items() if module() is None]:
        del _waiting[key]
    for param, module in holders.items():
        _waiting[id(param)] = weakref.ref(module), options
    if own is not None:
        own.wait()


def waiting(params: Iterable[nn.Parameter]) -> Any | None:
    """The options of an optimizer that waits for its first step on one of ``params``."""
    for param in params:
        holder, options = _waiting.get(id(param), (lambda: None, None))
        module = holder()
        if module is not None and any(param is other for other in module.parameters(recurse=False)):
            return options
    return None


def wait_no_more(params: Iterable[nn.Parameter]) -> None:
    for param in params:
        _waiting.pop(id(param), None)
