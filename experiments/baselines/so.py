"""SO, sparse optimization (arXiv 2504.12436, "Sparsity Outperforms Low-Rank Projections in Few-Shot Adaptation").

Adam on few entries of each matrix: of the gradient those that chance picks, of the moments those that matter. With
k = density m n entries, in step t = 1, 2, ...:

    every T steps, first in step 1:  S = k entries of W, uniformly at random
    on the union of S and of the support M of the moments (empty in step 1):
        g = the gradient on S, zero on the rest
        m, v = Adam's moments of g, those of entries outside M starting from zero
        W <- W - lr N,  N Adam's direction (with the global t)
    M <- the k entries of the union with the largest |m|; the other moments are forgotten

The rule is that of the published code, read together with the paper's description. An entry that joins late has a v
of one gradient under a bias correction near 1, so its first step is up to (1 - beta1) / sqrt(1 - beta2) = 19 lr long;
that is the rule, not an accident here. The published code couples weight decay to the gradient (L2); here it is
decoupled and dense, as for all baselines.

Kept per m x n matrix: the indices of M and S (int32), m and v, 16 k bytes. During the step N is a whole matrix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_mofa.options import OptionError, check_integer, check_number
from experiments.baselines.adam import adam_direction, adam_moments, check_adam
from experiments.baselines.matrix_method import MatrixMethod
from experiments.baselines.projected_gradient import Gradient
from experiments.baselines.randomness import keyed_generator

__all__ = ["SO", "spread"]


class SO(MatrixMethod):
    """See :mod:`experiments.baselines.so`.

    Args:
        params: param groups with ``lr`` and ``weight_decay``.
        density: share of a matrix's entries in S and in M, 0 < density <= 1; at least one entry.
        refresh_every: T, steps with one S.
        betas: of Adam's moments.
        eps: of Adam.
        seed: of S.
    """

    def __init__(
        self,
        params,
        *,
        density: float = 5e-4,
        refresh_every: int = 5,
        betas: Sequence[float] = (0.4, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
    ):
        check_number("density", density, low=0, open_low=True)
        if density > 1:
            raise OptionError(f"density={density!r} must be > 0 and <= 1: it is a share of the entries")
        check_integer("refresh_every", refresh_every, low=1, high=2**31)
        check_adam(betas, eps)
        super().__init__(params, density=density, refresh_every=refresh_every, betas=tuple(betas), eps=eps, seed=seed)

    def direction(self, G: Gradient, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor:
        t, flat = state["step"], G.value.reshape(-1)
        k = max(1, int(group["density"] * flat.numel()))
        if (t - 1) % group["refresh_every"] == 0:
            generator = keyed_generator(group["seed"], t, index, flat.device)
            drawn = torch.randperm(flat.numel(), generator=generator, device=flat.device)[:k]
            state["S"] = drawn.sort().values.int()
        if t == 1:
            state["M"], state["m"], state["v"] = state["S"][:0], flat[:0], flat[:0]
        S, M = state["S"].long(), state["M"].long()
        union = torch.cat([M, S]).unique()
        m, v = spread(state["m"], M, union), spread(state["v"], M, union)
        m, v = adam_moments(m, v, spread(flat[S], S, union), group["betas"])
        kept = m.abs().topk(k).indices
        state["M"], state["m"], state["v"] = union[kept].int(), m[kept], v[kept]
        return spread(adam_direction(m, v, t, group["betas"], group["eps"]), union, flat.numel()).view_as(G.value)


def spread(values: Tensor, places: Tensor, among: Tensor | int) -> Tensor:
    """``values`` at ``places`` and zero elsewhere.

    Args:
        values: (k,).
        places: (k,), where they go.
        among: the places of the result, sorted and with all of ``places`` in it, or how many, from 0.
    """
    if isinstance(among, int):
        return values.new_zeros(among).index_copy_(0, places, values)
    return values.new_zeros(among.shape).index_copy_(0, torch.searchsorted(among, places), values)
