"""The two sides of capture: what takes a module's gradients, and what they are added to."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from ds_mofa.parameters import Matrix

__all__ = ["Arrived", "Begin", "Capture", "Gathered", "Sink"]

# From a weight to the whole of it, where a backend releases weights between forward and backward.
Gathered = Callable[[Tensor], AbstractContextManager[Tensor]]
# Something is about to be added to a sketch, and ``.grad`` does not say so yet.
Begin = Callable[[], None]


class Arrived(NamedTuple):
    """A gradient as a process has it.

    Attributes:
        rows: (k, n), or of a stack its matrices (k, m, n), on the device of the sketches.
        first: row of the matrix, or matrix of the stack, that the first of them is.
        weight: what they count in the sum over all processes.
    """

    rows: Tensor
    first: int
    weight: float


class Sink(Protocol):
    """Where the gradient of one matrix (m, n), or of a stack (E, m, n), adds up.

    Attributes:
        param: the matrix, from :func:`ds_mofa.capture.attach.attach` on.
        leaf: set by a capture: from ``param`` to the tensor whose gradient the module's backward accumulates, where a
            backend puts another in its place for forward and backward.
        grad: what ``param.grad`` is while it has a gradient; None where ``.grad`` stays None.
        fp8: whether the module's products are to be taken in floats of eight bits, where a capture can.
    """

    param: nn.Parameter | None
    leaf: Callable[[Tensor], Tensor | None] | None
    grad: Tensor | None
    fp8: bool

    def add_linear(self, x: Tensor, dy: Tensor) -> None:
        """Add G = dy^T x. x: (..., n), dy: (..., m), of one dtype."""

    def add_rows(self, ids: Tensor, dy: Tensor) -> None:
        """Add G with G[i] the sum of dy over ids == i. ids: (...), integers below m; dy: (..., n)."""

    def add_grouped(
        self,
        left: Tensor,
        right: Tensor,
        ends: Tensor,
        left_rows: Tensor | None = None,
        right_rows: Tensor | None = None,
    ) -> None:
        """Add G_e = left_e^T right_e to every matrix e of a stack. left: (S, m), right: (S, n), of one dtype, of which the
        rows [ends[e - 1], ends[e]) are e's; ends: (E,), int32. With rows (S,), int32, of either, that is (T, ...) in any
        order, and they say which of its rows each of the S is.
        """

    def add_gradient(self, grad: Tensor) -> None:
        """Add a gradient that exists. grad: (m, n), or (E, m, n)."""

    def take(self, grad: Tensor) -> None:
        """Autograd has put a gradient of its own making into ``param.grad``. grad: as the parameter is."""


class Capture(Protocol):
    """Takes the gradient of one kind of module's weight without forming it, and puts it into a sink.

    What no capture serves is formed by autograd and goes through the parameter's hook (:mod:`ds_mofa.capture.hook`).
    """

    def serves(self, module: nn.Module, matrix: Matrix) -> bool:
        """Whether ``module``, which holds ``matrix``, is of this kind."""

    def attach(self, module: nn.Module, matrix: Matrix, sink: Sink, gathered: Gathered | None) -> Callable[[], None]:
        """Change the module, and return what undoes that. A later optimizer's change stays.

        Raises:
            OptionError: something else has changed the module already.
        """
