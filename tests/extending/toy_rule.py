"""A rule from outside of the package: SGD in a random subspace that stays, W <- W - lr Psi Psi^T G.

Psi (m x r) is the Gaussian test matrix of the first step, of variance 1 / r an element: Psi Psi^T G is G in the mean.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.registry import register
from ds_mofa.options import OptimizerOptions
from ds_mofa.rules.batch import Field, MatrixBatch
from ds_mofa.rules.rule import Rule, State

__all__ = ["Toy", "ToyOptions", "ToyRule"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyOptions(OptimizerOptions):
    title: ClassVar[str] = "Toy"
    lr: float = 1e-2


class ToyRule(Rule):
    name = "Toy"

    def __init__(self, options: ToyOptions):
        super().__init__(options.rank, options.seed)

    @staticmethod
    def fields(m: int, n: int, r: int) -> tuple[Field, ...]:
        return (Field("Psi", (m, r), "left"),)

    def squared_norms(self, batches: Sequence[MatrixBatch], step: int) -> list[tuple[Tensor, None]]:
        norms = [torch.linalg.vector_norm(batch.Z, dim=(-2, -1), dtype=torch.float64) for batch in batches]
        return [(norm.square(), None) for norm in norms]

    def update(self, batches: Sequence[MatrixBatch], reused: Sequence[Any], *, step: int, clip: float | Tensor) -> None:
        for batch in batches:
            batch.Y.copy_(batch.left)  # the new left: Psi once more; the new right is Z = G^T Psi as it stands
            batch.Z.mul_(clip)
            batch.spectrum.fill_(1)

    def lr_factor(self, m: int, n: int) -> float:
        return 1.0

    def resized(self, saved: Sequence[State], ranks: set[int]) -> tuple[list[State], str]:
        raise ValueError(f"a subspace of rank {ranks} is none of rank {self.r}. Use the rank that it was saved with")


@register
class Toy(MatrixOptimizer):
    options_class = ToyOptions
    rule_class = ToyRule
