"""GUM, "GaLore Unbiased with Muon" (arXiv 2510.17802): a subspace for most matrices, its complement for the others.

For a gradient G seen wide (s x l, s <= l; a tall or square one transposed). A period is K steps. At its first step,
for each matrix by itself,

    P (s, r) = the r leading left singular vectors of G
    with probability q the matrix is sampled for full-rank steps
    R = 0

and in every step of it

    not sampled:  R <- beta R + 1 / (1 - q)  P^T G               (r x l)      D = P NS(R)
    sampled:      R <- beta R + 1 / q        (G - P P^T G)       (s x l)      D = NS(R)
    W <- W - lr f(m, n) D

NS is Muon's orthogonalisation (:mod:`experiments.baselines.newton_schulz`), f its factor by shape. Over the sampling,
the increment of the momentum (P P^T G / (1 - q), or the residual / q) has the mean G: that is the unbiasedness.

What is certain and what is not; no published code was found. The two updates, their weights and q = gamma / (number of
layers) are the paper's, as reported by others; its gamma counts layers, ours is a probability for each matrix, drawn
independently. That the momentum starts from zero in every period is our reading: the two branches' momenta have
different shapes, and P changes. Given that, and since NS does not feel the scale of R, the weights 1 / q and
1 / (1 - q) change no update; they matter to the estimate alone. The paper projects from the left; as in GaLore's code
it is the smaller dimension here. Nesterov is not in the equations and not here. No f is stated; torch's names for it
apply, with the same default as for the Muon beside it.

q = 0 is a biased ablation, GaLore with Muon for Adam. q = 1 would never train P's directions, and is refused.

Kept per m x n matrix, s = min(m, n) and l = max(m, n): P and R, 4 (s r + r l) bytes, or where sampled 4 (s r + m n).
"""

from typing import Any

from torch import Tensor

from ds_mofa.kernels.random_bits import Rounding, rounding_key
from ds_mofa.options import AdjustLr, MoFaSGDRuleOptions, check_integer, check_number
from experiments.baselines.matrix_method import MatrixMethod
from experiments.baselines.newton_schulz import orthogonalized
from experiments.baselines.projected_gradient import Gradient
from experiments.baselines.subspace import leading_subspace

__all__ = ["GUM", "gradient_estimate", "is_sampled"]


class GUM(MatrixMethod):
    """See :mod:`experiments.baselines.gum`.

    Args:
        params: param groups with ``lr`` and ``weight_decay``.
        rank: r.
        q: probability that a matrix is sampled for the full-rank steps of a period.
        period: K.
        momentum: beta.
        ns_steps: iterations of Newton-Schulz.
        adjust_lr_fn: f, as for :class:`ds_mofa.options.MoFaSGDRuleOptions`.
        seed: of the sampling.
    """

    def __init__(
        self,
        params,
        *,
        rank: int,
        q: float = 1 / 16,
        period: int = 200,
        momentum: float = 0.95,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr = "match_rms_adamw",
        seed: int = 0,
    ):
        check_number("q", q, low=0, high=1)
        check_number("momentum", momentum, low=0, high=1)
        check_integer("period", period, low=1, high=2**31)
        check_integer("ns_steps", ns_steps, low=1, high=100)
        self._options = MoFaSGDRuleOptions(adjust_lr_fn=adjust_lr_fn)
        super().__init__(params, rank=rank, q=q, period=period, momentum=momentum, ns_steps=ns_steps, seed=seed)

    def lr_factor(self, m: int, n: int) -> float:
        return self._options.shape_factor(m, n)

    def direction(self, G: Gradient, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor:
        done = state["step"] - 1
        starts, full = self._starts(done, group), self._is_full(done, group, index)
        if starts:
            state["P"] = leading_subspace(G.value, group["rank"])
        estimate = gradient_estimate(G, state["P"], full, group["q"])
        state["R"] = estimate if starts else group["momentum"] * state["R"] + estimate
        D = orthogonalized(state["R"], group["ns_steps"])
        return D if full else state["P"] @ D

    def projector(self, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor | None:
        done = state["step"]
        return None if self._starts(done, group) or self._is_full(done, group, index) else state["P"]

    @staticmethod
    def _starts(done: int, group: dict[str, Any]) -> bool:
        """Whether the step after ``done`` others is the first of a period."""
        return done % group["period"] == 0

    @staticmethod
    def _is_full(done: int, group: dict[str, Any], index: int) -> bool:
        return is_sampled(group["q"], group["seed"], done // group["period"], index)


def gradient_estimate(G: Gradient, P: Tensor, full: bool, q: float) -> Tensor:
    """What a sampled matrix, (s, l), or another, (r, l) in the basis P, adds to its momentum."""
    R = G.through(P)
    return (G.value - P @ R) / q if full else R / (1 - q)


def is_sampled(q: float, seed: int, period: int, index: int) -> bool:
    """Whether matrix ``index`` takes full-rank steps in this period: with probability q, alike on every machine."""
    return rounding_key(Rounding(False, seed, period), index) < q * 2**32
