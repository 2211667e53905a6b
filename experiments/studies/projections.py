"""Ways of keeping a momentum of rank r, each moved by its own projection of the gradient.

All work on batches: G (B, m, n), U (B, m, r), V (B, n, r), and all start from the same factors. Each has

    projected(G)     what it sees of a gradient, (B, m, n), with its subspace as it is before the step
    move(G, beta)    M <- beta M + (1 - beta) P(G), cut to rank r where that is needed
    dense()          M, (B, m, n)
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ds_mofa.linalg.factors import Factors, update_factors

__all__ = [
    "KINDS",
    "REFRESH_EVERY",
    "Left",
    "Mirrored",
    "Projection",
    "Refreshed",
    "Tangent",
    "TwoSided",
    "first_factors",
]

REFRESH_EVERY = 50  # steps, of the kind "refreshed"


class Projection(Protocol):
    def projected(self, G: Tensor) -> Tensor: ...

    def move(self, G: Tensor, beta: float) -> None: ...

    def dense(self) -> Tensor: ...


class Tangent:
    """MoFaSGD's: U U^T G + G V V^T - U U^T G V V^T, and :func:`ds_mofa.linalg.factors.update_factors`."""

    def __init__(self, start: Factors):
        self.factors = start

    def projected(self, G: Tensor) -> Tensor:
        return sum(self.parts(G).values())

    def parts(self, G: Tensor) -> dict[str, Tensor]:
        """The projection as the sum of three that are orthogonal to each other."""
        U, _, V = self.factors
        inside = U @ (U.mT @ G @ V) @ V.mT
        return {"inside": inside, "left": U @ (U.mT @ G) - inside, "right": (G @ V) @ V.mT - inside}

    def move(self, G: Tensor, beta: float) -> None:
        U, _, V = self.factors
        self.factors = update_factors(self.factors, G @ V, G.mT @ U, beta=beta, gamma=1 - beta)

    def dense(self) -> Tensor:
        U, sigma, V = self.factors
        return (U * sigma.unsqueeze(-2)) @ V.mT


class Left:
    """U U^T G. The momentum is U C with C (B, r, n), so its rank never exceeds r and U stays what it was at first."""

    def __init__(self, start: Factors):
        self.U = start.U
        self.C = start.sigma.unsqueeze(-1) * start.V.mT

    def projected(self, G: Tensor) -> Tensor:
        return self.U @ (self.U.mT @ G)

    def move(self, G: Tensor, beta: float) -> None:
        self.C = beta * self.C + (1 - beta) * (self.U.mT @ G)

    def dense(self) -> Tensor:
        return self.U @ self.C


class Refreshed(Left):
    """U anew every so many steps, from the SVD of the gradient at hand, as GaLore does.

    The momentum is projected onto the new U, where GaLore itself reads the old coordinates in the new basis.
    """

    def __init__(self, start: Factors, every: int = REFRESH_EVERY):
        super().__init__(start)
        self._every, self._steps = every, 1  # the start was a step, and has seen to U

    def move(self, G: Tensor, beta: float) -> None:
        if self._steps % self._every == 0:
            new = _leading_left(G, self.U.shape[-1])
            self.U, self.C = new, new.mT @ self.U @ self.C
        self._steps += 1
        super().move(G, beta)


class Mirrored:
    """Another way, on the transposes: of :class:`Left` it makes G V V^T."""

    def __init__(self, way: Callable[[Factors], Projection], start: Factors):
        self._way = way(Factors(start.V, start.sigma, start.U))

    def projected(self, G: Tensor) -> Tensor:
        return self._way.projected(G.mT).mT

    def move(self, G: Tensor, beta: float) -> None:
        self._way.move(G.mT, beta)

    def dense(self) -> Tensor:
        return self._way.dense().mT


class TwoSided:
    """U U^T G V V^T. The momentum is U c V^T with c (B, r, r); neither U nor V ever moves."""

    def __init__(self, start: Factors):
        self.U, _, self.V = start
        self.c = torch.diag_embed(start.sigma)

    def projected(self, G: Tensor) -> Tensor:
        return self.U @ (self.U.mT @ G @ self.V) @ self.V.mT

    def move(self, G: Tensor, beta: float) -> None:
        self.c = beta * self.c + (1 - beta) * (self.U.mT @ G @ self.V)

    def dense(self) -> Tensor:
        return self.U @ self.c @ self.V.mT


def _on_the_shorter_side(start: Factors) -> Projection:
    """As GaLore chooses."""
    return Refreshed(start) if start.U.shape[-2] <= start.V.shape[-2] else Mirrored(Refreshed, start)


KINDS: dict[str, Callable[[Factors], Projection]] = {
    "tangent": Tangent,
    "left": Left,
    "right": lambda start: Mirrored(Left, start),
    "two-sided": TwoSided,
    "refreshed": _on_the_shorter_side,
}


def first_factors(G: Tensor, r: int, beta: float) -> Factors:
    """The exact rank-r SVD of (1 - beta) G, where every kind starts."""
    U, sigma, Vt = torch.linalg.svd(G, full_matrices=False)
    return Factors(U[..., :r], (1 - beta) * sigma[..., :r], Vt[..., :r, :].mT)


def _leading_left(G: Tensor, r: int) -> Tensor:
    """The leading left singular vectors of G (B, m, n), m <= n, by its Gram matrix in float64."""
    double = G.double()
    return torch.linalg.eigh(double @ double.mT).eigenvectors[..., -r:].flip(-1).to(G.dtype)
