"""Fira (arXiv 2410.01623): GaLore, and the gradient outside the subspace, scaled as Adam scaled that inside.

With P, R = P^T G and N of :mod:`experiments.baselines.galore`, column by column (row by row for a tall matrix):

    phi_j = |N_j| / |R_j|                       what Adam did to the norm of column j inside the subspace
    S_j   = phi_j (G - P R)_j                   norm-based scaling of what GaLore drops
    if |S| > gamma |S'|:  S <- S gamma |S'| / |S|     norm-growth limiter; S' is the last step's S after its limiter
    W <- W - lr (alpha P N + S)

Two choices where paper and code differ or are silent. The residual is G - P R, as in the paper; its published code
subtracts alpha P R, the same thing at alpha = 1, which is the default here. N carries Adam's bias corrections, as the
whole update does; the published code compares the limiter's norms before them.

Kept per m x n matrix, s = min(m, n) and l = max(m, n): P, m, v and |S'|, 4 (s r + 2 l r) + 4 bytes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_mofa.options import check_number
from experiments.baselines.galore import GaLore
from experiments.baselines.projected_gradient import Gradient

__all__ = ["Fira", "scaled_residual", "growth_limited"]


class Fira(GaLore):
    """See :mod:`experiments.baselines.fira`.

    Args:
        params: param groups with ``lr`` and ``weight_decay``.
        rank: r.
        refresh_every: T, steps between two subspaces.
        alpha: scale of the part inside the subspace.
        gamma: the largest growth of |S| from step to step.
        betas: of Adam's moments.
        eps: of Adam.
    """

    def __init__(
        self,
        params,
        *,
        rank: int,
        refresh_every: int = 200,
        alpha: float = 1.0,
        gamma: float = 1.01,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        check_number("gamma", gamma, low=1)
        super().__init__(params, rank=rank, refresh_every=refresh_every, alpha=alpha, betas=betas, eps=eps)
        for group in self.param_groups:
            group["gamma"] = gamma

    def direction(self, G: Gradient, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor:
        R, N = self.projected(G, state, group)
        S = scaled_residual(G.value, state["P"], R, N)
        S, state["residual_norm"] = growth_limited(S, state.get("residual_norm"), group["gamma"])
        return group["alpha"] * (state["P"] @ N) + S

    def projector(self, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        return None  # the residual needs all of G


def scaled_residual(G: Tensor, P: Tensor, R: Tensor, N: Tensor) -> Tensor:
    """S (s, l), before the limiter. A column without gradient inside the subspace gets no step outside it."""
    inside = torch.linalg.vector_norm(R, dim=0)
    phi = torch.where(inside > 0, torch.linalg.vector_norm(N, dim=0) / inside, 0.0)
    return phi * (G - P @ R)


def growth_limited(S: Tensor, last: Tensor | None, gamma: float) -> tuple[Tensor, Tensor]:
    """S with a norm of at most gamma times ``last``, and that norm, a scalar.

    A last norm of None or 0 limits nothing: from zero no growth by a factor would ever lead away.
    """
    norm = torch.linalg.matrix_norm(S)
    if last is None:
        return S, norm
    limited = torch.where(last > 0, torch.minimum(norm, gamma * last), norm)
    return S * torch.where(norm > 0, limited / norm, 1.0), limited
