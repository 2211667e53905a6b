"""Capture for methods that see the gradient through a projector: P^T G from x and dY, without G.

For y = x W^T the gradient is G = dY^T x, so P^T G = (dY P)^T x, or for a tall W, whose smaller dimension is the other,
(G P)^T = (x P)^T dY: one thin product and one of r rows instead of the weight-gradient GEMM. That is what
MoFaSGD's linear (:mod:`ds_mofa.capture`) does on both sides; this is its one-sided sketch, filled by the same linear and
the same hook.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_mofa.capture.products import add_to_rows
from experiments.baselines.orientation import wide

__all__ = ["Gradient", "ProjectedGradient"]


class Gradient(NamedTuple):
    """What a step is given of G (s, l), s <= l: all of it where ``whole``, else P^T G (r, l) for the P asked for."""

    value: Tensor
    whole: bool

    def through(self, P: Tensor) -> Tensor:
        """P^T G."""
        return P.mT @ self.value if self.whole else self.value


class ProjectedGradient:
    """Where one matrix's gradient adds up over the backwards of a step, seen wide (s x l, s <= l).

    Args:
        shape: (m, n).
        projector: gives the P (s, r) to see the gradient through, or None where all of G is needed; asked at the first
            backward of each step.

    Attributes:
        value: the sum so far: P^T G (r, l), in float32 or better, or G (s, l) in its own dtype. None: no backward yet.
        P: of ``value``.
    """

    param: nn.Parameter | None = None
    grad = None  # as ds_mofa.capture.sketch.Sketch has them: here the matrix's .grad stays None
    fp8 = False

    def __init__(self, shape: tuple[int, int], projector: Callable[[], Tensor | None]):
        self.value: Tensor | None = None
        self.P: Tensor | None = None
        self._shape, self._projector = shape, projector

    def add_linear(self, x: Tensor, dy: Tensor) -> None:
        """Add G = dy^T x, formed only where P is None. x: (..., n), dy: (..., m)."""
        P, (m, n) = self._current(), self._shape
        x, dy = x.reshape(-1, n), dy.reshape(-1, m)
        short, long = (dy, x) if m < n else (x, dy)
        self._add((short if P is None else short @ P.to(short.dtype)).mT @ long)

    def add_rows(self, ids: Tensor, dy: Tensor) -> None:
        """Add G with G[i] the sum of dy over ids == i, formed only where it is not taller than wide, or P is None.
        ids: (...), dy: (..., n).
        """
        P, (m, n) = self._current(), self._shape
        ids, dy = ids.reshape(-1), dy.reshape(-1, n)
        if P is not None and m >= n:
            dy = dy @ P.to(dy.dtype)
        G = torch.zeros(m, dy.shape[-1], dtype=dy.dtype, device=dy.device)
        add_to_rows(G, ids, dy)
        if m >= n:
            self._add(G.mT)
        else:
            self._add(G if P is None else P.to(G.dtype).mT @ G)

    def add_grouped(
        self,
        left: Tensor,
        right: Tensor,
        ends: Tensor,
        left_rows: Tensor | None = None,
        right_rows: Tensor | None = None,
    ) -> None:
        """No baseline trains a stack."""
        raise NotImplementedError

    @torch.no_grad()
    def add_gradient(self, grad: Tensor) -> None:
        """Add a gradient that exists, and is given up to this. grad: (m, n)."""
        P, G = self._current(), wide(grad)
        self._add(G if P is None else P.to(G.dtype).mT @ G)

    def take(self, grad: Tensor) -> None:
        """Add what autograd has put into the matrix's ``.grad``, and take it from there."""
        self.add_gradient(grad)
        self.param.grad = None

    def _current(self) -> Tensor | None:
        if self.value is None:
            self.P = self._projector()
        return self.P

    def _add(self, part: Tensor) -> None:
        if self.P is not None:
            part = part.to(torch.promote_types(part.dtype, torch.float32))
        self.value = part if self.value is None else self.value.add_(part)
