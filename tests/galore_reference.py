"""GaLore with bases from sketches once more, dense, in float64 and in one process: what every stage must agree with.

The equations are the baseline's (:mod:`experiments.baselines.galore`), on whole gradients of autograd's; only the
bases come from seeded sketches of them, and are in force one step later. See :mod:`ds_mofa.rules.galore`. A matrix
without a gradient does nothing in that step, and Adam counts the steps that had one.
"""

import math

import torch
from torch import Tensor, nn

from ds_mofa.kernels.random_bits import Rounding, rounding_key
from experiments.baselines.adam import adam_direction, adam_moments
from experiments.baselines.orientation import like, wide
from experiments.baselines.subspace import leading_subspace
from tests.reference import Reference

__all__ = ["DenseGaLore", "GaLoreReference"]


class DenseGaLore:
    """One matrix' basis and moments.

    Attributes:
        P: (s, r), of the next step; None before the first gradient.
        direction: (m, n), P N of the last step; None where it was the first with a gradient.
        M: m x n, the first moment in the weights' coordinates, P m.
    """

    def __init__(self, shape, *, rank, refresh_every, betas, eps, index, seed=0):
        self.shape, self.rank, self.index, self.seed = shape, rank, index, seed
        self.refresh_every, self.betas, self.eps = refresh_every, betas, eps
        self.P, self.steps, self.t = None, 0, 0
        self.m = self.v = torch.zeros(rank, max(shape), dtype=torch.float64)

    @property
    def M(self) -> Tensor:
        return like(self.P @ self.m, self.shape)

    def square_norm(self, G: Tensor) -> Tensor:
        short, long = self._first_tests()
        if self.steps == 0:
            return ((wide(G) @ long).square().sum() + (short.mT @ wide(G)).square().sum()) / 2
        return ((short if self.P is None else self.P).mT @ wide(G)).square().sum()

    def move(self, G: Tensor, _: float = 0.0) -> None:
        self.direction = None
        if self.P is not None:
            self.m, self.v = adam_moments(self.m, self.v, self.P.mT @ wide(G), self.betas)
            self.direction = like(self.P @ adam_direction(self.m, self.v, self.t, self.betas, self.eps), self.shape)
        if self.P is None or self.steps % self.refresh_every == 0:
            chosen = self.steps - self.steps % self.refresh_every  # the last step that has drawn a test matrix
            test = self._drawn(chosen, max(self.shape))[0] if chosen else self._first_tests()[1]
            self.P = leading_subspace(wide(G) @ test, self.rank)
        self.steps, self.t = self.steps + 1, self.t + 1

    def wait(self) -> None:
        self.steps += 1

    def _first_tests(self) -> tuple[Tensor, Tensor]:
        """Of the short and of the long side."""
        psi, omega = self._drawn(0, *self.shape)
        return (psi, omega) if self.shape[0] < self.shape[1] else (omega, psi)

    def _drawn(self, step: int, *sizes: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(rounding_key(Rounding(False, self.seed, step), self.index))
        return [(torch.randn(size, self.rank, generator=generator) / math.sqrt(self.rank)).double() for size in sizes]


class GaLoreReference(Reference):
    """Trains ``model`` in float64: ``matrices`` by GaLore, its other trained parameters by AdamW."""

    def __init__(self, model: nn.Module, matrices: list[str], *, rank, refresh_every, alpha, betas, eps, **settings):
        super().__init__(model, matrices, rank=rank, beta=0.0, **settings)
        self.alpha = alpha
        self.momenta = {
            name: DenseGaLore(
                tuple(self.params[name].shape), rank=rank, refresh_every=refresh_every, betas=betas, eps=eps, index=i
            )
            for i, name in enumerate(matrices)
        }

    def _move_matrix(self, name: str, param: Tensor, grad: Tensor) -> None:
        lr, direction = self.lr(self.steps), self.momenta[name].direction
        param.mul_(1 - lr * self.weight_decay)
        if direction is not None:
            param.sub_(lr * self.alpha * direction)
