"""The sketches of one matrix or stack: every backward adds to Y = G V and Z = G^T U, and G is never kept."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ds_mofa.capture import compiled
from ds_mofa.capture.products import add_grouped, add_product, add_to_rows
from ds_mofa.capture.queue import Queue
from ds_mofa.capture.sink import Arrived, Begin
from ds_mofa.phases import phase

__all__ = ["Sketch"]


class Sketch:
    """Where one matrix's sketches add up, and the factors that they are taken with; of a stack of E, all have E before
    their other dimensions.

    Attributes:
        Y: (m, r), fp32, sum of G V over the micro-batches since the last step.
        Z: (n, r), fp32, sum of G^T U.
        U: (m, r), working copy in the compute dtype; before the first step the test matrix Psi.
        V: (n, r), likewise; before the first step Omega.
        param: the matrix, from :func:`ds_mofa.capture.attach.attach` on.
        leaf: from ``param`` to the tensor whose gradient a backward accumulates: FSDP2 gathers another.
        arrived: what this process has of a gradient that exists; None: all of it.
        grad: what ``param.grad`` is while it has a gradient; None where ``.grad`` stays None.
        begin: with a ``grad``: lets ``param.grad`` say so.
        filled: with a ``grad``: whether Y and Z hold anything.
        unmarked: they do, and ``.grad`` could not be made to say so.
        fp8: see :class:`ds_mofa.capture.sink.Sink`.
        addresses: of Y, Z, U and V.
    """

    __slots__ = (
        "Y",
        "Z",
        "U",
        "V",
        "param",
        "leaf",
        "arrived",
        "grad",
        "begin",
        "filled",
        "unmarked",
        "fp8",
        "key",
        "addresses",
        "_queue",
        "__weakref__",
    )

    def __init__(self, Y: Tensor, Z: Tensor, U: Tensor, V: Tensor, queue: Queue | None = None):
        self.Y, self.Z, self.U, self.V = Y, Z, U, V
        self.param: nn.Parameter | None = None
        self.leaf: Callable[[Tensor], Tensor | None] | None = None
        self.arrived: Callable[[Tensor], Arrived] | None = None
        self.grad: Tensor | None = None
        self.begin: Begin | None = None
        self.filled = self.unmarked = self.fp8 = False
        self.key = compiled.key_of(self)
        self._queue = queue
        self.addresses = Y.data_ptr(), Z.data_ptr(), U.data_ptr(), V.data_ptr()

    def add_linear(self, x: Tensor, dy: Tensor) -> None:
        """Add G = dy^T x without forming it. x: (..., n), dy: (..., m), of one dtype."""
        self.open()
        queue = self.queue_of(x, dy)
        if queue is None:
            self.add_products(x, dy)
        else:
            queue.add(self.addresses, x.contiguous(), dy.contiguous())

    def queue_of(self, x: Tensor, dy: Tensor) -> Queue | None:
        """What takes these, or None where :meth:`add_products` does."""
        return self._queue if x.dtype == self.V.dtype == dy.dtype else None

    def add_products(self, x: Tensor, dy: Tensor) -> None:
        """:meth:`add_linear`, at once, by a product after the other. :meth:`open` comes before it."""
        with phase("capture"):
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            add_product(self.Y, dy.mT, x @ self.V.to(x.dtype))
            add_product(self.Z, x.mT, dy @ self.U.to(dy.dtype))

    def add_rows(self, ids: Tensor, dy: Tensor) -> None:
        """Add G with G[i] the sum of dy over ids == i, without forming it. ids: (...), dy: (..., n)."""
        self.open()
        with phase("capture"):
            ids, dy = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
            add_to_rows(self.Y, ids, dy @ self.V.to(dy.dtype))
            add_product(self.Z, dy.mT, self.U.index_select(0, ids).to(dy.dtype))

    def add_grouped(
        self,
        left: Tensor,
        right: Tensor,
        ends: Tensor,
        left_rows: Tensor | None = None,
        right_rows: Tensor | None = None,
    ) -> None:
        """Add G_e = left_e^T right_e to each matrix e of a stack, without forming it; see
        :class:`ds_mofa.capture.sink.Sink`.
        """
        self.open()
        with phase("capture"):
            add_grouped(self.Y, self.Z, left, right, self.U, self.V, ends, left_rows, right_rows)

    @torch.no_grad()
    def add_gradient(self, grad: Tensor) -> None:
        """Add a gradient that exists. grad: (m, n), or (E, m, n); of a sharded one its DTensor, or this process's rows of
        it.
        """
        self.open()
        Y, Z, U, V, weight = self.Y, self.Z, self.U, self.V, 1.0
        grad = grad.to_dense() if grad.is_sparse else grad
        if self.arrived is not None:
            grad, first, weight = self.arrived(grad)
            here = slice(first, first + len(grad))
            Y, U = Y[here], U[here]
            if grad.dim() > 2:
                Z, V = Z[here], V[here]
        if len(grad):
            add_product(Y, grad, V.to(grad.dtype), weight)
            add_product(Z, grad.mT, U.to(grad.dtype), weight)

    def take(self, grad: Tensor) -> None:
        """Sketch what autograd has put into ``param.grad``: at once, or where ``.grad`` is a mark, when that is begun."""
        if self.grad is None:
            self.add_gradient(grad)
            if self.param is not None:
                self.param.grad = None
        else:
            self.open()

    def add_sums(self, other: "Sketch", scale: Tensor) -> None:
        """Add what another sketch of the same factors holds, times a scalar tensor."""
        self.open()
        self.Y.addcmul_(other.Y, scale.to(other.Y.dtype))
        self.Z.addcmul_(other.Z, scale.to(other.Z.dtype))

    def open(self) -> None:
        """Before something is added to Y and Z: let ``.grad`` say that there is a gradient."""
        mark = self.grad
        if mark is None or self.begin is None:
            return
        param = self.param
        if param is None or not (self.filled and param.grad is mark):
            self.begin()

    def clear(self) -> None:
        """Drop what Y and Z hold, and what waits to be added to them since a backward that raised."""
        if self._queue is not None:
            self._queue.flush()
        self.Y.zero_()
        self.Z.zero_()

    def emptied(self) -> "Sketch":
        """One with the same factors, and sums of its own that are zero."""
        return Sketch(torch.zeros_like(self.Y), torch.zeros_like(self.Z), self.U, self.V)
