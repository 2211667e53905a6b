"""GaLore (arXiv 2403.03507): Adam on the gradient's projection onto its own leading subspace.

For a gradient G seen wide (s x l, s <= l; a tall or square one transposed), in step t = 1, 2, ...:

    every T steps, first in step 1:  P (s, r) = the r leading left singular vectors of G
    R = P^T G                                                   (r x l)
    m, v = Adam's moments of R,   N = Adam's direction          (r x l)
    W <- W - lr alpha P N

As in the paper's code, a refresh of P changes neither m nor v, although they then speak of other directions;
``reset_every`` (:mod:`experiments.baselines.restarts`) forgets them.

Kept per m x n matrix, s = min(m, n) and l = max(m, n): P, m, v, 4 (s r + 2 l r) bytes.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ds_mofa.options import check_integer, check_number
from experiments.baselines.adam import adam_direction, adam_moments, check_adam
from experiments.baselines.matrix_method import MatrixMethod
from experiments.baselines.projected_gradient import Gradient
from experiments.baselines.subspace import leading_subspace

__all__ = ["GaLore"]


class GaLore(MatrixMethod):
    """See :mod:`experiments.baselines.galore`.

    Args:
        params: param groups with ``lr`` and ``weight_decay``.
        rank: r.
        refresh_every: T, steps between two subspaces.
        alpha: scale of the update.
        betas: of Adam's moments.
        eps: of Adam.
    """

    def __init__(
        self,
        params,
        *,
        rank: int,
        refresh_every: int = 200,
        alpha: float = 0.25,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        check_integer("refresh_every", refresh_every, low=1, high=2**31)
        check_number("alpha", alpha, low=0, open_low=True)
        check_adam(betas, eps)
        super().__init__(params, rank=rank, refresh_every=refresh_every, alpha=alpha, betas=tuple(betas), eps=eps)

    def direction(self, G: Gradient, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor:
        _, N = self.projected(G, state, group)
        return group["alpha"] * (state["P"] @ N)

    def projector(self, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor | None:
        return None if state["step"] % group["refresh_every"] == 0 else state["P"]

    @staticmethod
    def projected(G: Gradient, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """R and N, (r, l), after the refresh that is due; moves the moments."""
        t = state["step"]
        if (t - 1) % group["refresh_every"] == 0:
            state["P"] = leading_subspace(G.value, group["rank"])
        R = G.through(state["P"])
        if t == 1:
            state["m"], state["v"] = R.new_zeros(R.shape), R.new_zeros(R.shape)
        state["m"], state["v"] = adam_moments(state["m"], state["v"], R, group["betas"])
        return R, adam_direction(state["m"], state["v"], t, group["betas"], group["eps"])
