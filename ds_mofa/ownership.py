"""Who trains a matrix: one optimizer at a time. The one built last takes over, by name, and the earlier one may not step.

A parameter knows nothing of this: what stands on it would be pickled, copied and saved with the model.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping

from torch import nn

__all__ = ["Claim", "LostError", "claim", "release"]

logger = logging.getLogger("ds_mofa")

# By the id of a parameter, which a claim that is held keeps alive. A weak reference to the parameter itself would keep torch
# from swapping it (torch.utils.swap_tensors).
_claims: "weakref.WeakValueDictionary[int, Claim]" = weakref.WeakValueDictionary()


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

    def give_up(self) -> None:
        """End it, by the optimizer's own wish."""
        self._let_go, self.params = None, []

    def lose(self, to: str) -> None:
        """End it, because ``to`` takes over: the optimizer lets go of the model, and is told when it steps next."""
        if self._let_go is None:
            return
        let_go, self._let_go, self._lost_to = self._let_go, None, to
        self.params = []
        logger.warning("ds_mofa: %s takes over the matrices of a %s that was built before", to, self.title)
        let_go()


def claim(title: str, matrices: Mapping[nn.Parameter, str], let_go: Callable[[], None]) -> Claim:
    """Claim parameters for an optimizer, from whichever had them.

    Args:
        title: of the optimizer.
        matrices: parameters with their names.
        let_go: puts the model back as it was before the optimizer; it must not keep the optimizer alive.
    """
    release(matrices, to=f"another {title}")
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
