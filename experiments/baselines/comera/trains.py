"""Tensor trains as lists of cores: shapes, ranks, and where the cores come from. Pure functions.

A train over dimensions n_1, ..., n_K has cores G_k (r_{k-1}, n_k, r_k), r_0 = r_K = 1, and stands for the tensor
T[i_1, ..., i_K] = G_1[:, i_1, :] G_2[:, i_2, :] ... G_K[:, i_K, :].
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["factors", "padded_factors", "bounded_ranks", "gaussian_cores", "tt_svd", "full"]

_PADDING = 0.05  # of the rows of an embedding, at most


def factors(number: int, count: int) -> tuple[int, ...] | None:
    """``count`` factors above 1 with the product ``number`` and the least sum, ascending; None where there are none."""
    found = [(sum(way), way) for way in _ways(number, count, 2)]
    return min(found)[1] if found else None


def padded_factors(number: int, count: int) -> tuple[int, ...] | None:
    """As :func:`factors`, of the number whose factors have the least sum, among those up to 5 % larger."""
    among = range(number, math.floor(number * (1 + _PADDING)) + 1)
    found = [(sum(way), math.prod(way), way) for near in among for way in [factors(near, count)] if way is not None]
    return min(found)[2] if found else None


def _ways(number: int, count: int, smallest: int) -> list[tuple[int, ...]]:
    if count == 1:
        return [(number,)] if number >= smallest else []
    ways, factor = [], smallest
    while factor**count <= number:
        if number % factor == 0:
            ways += [(factor, *way) for way in _ways(number // factor, count - 1, factor)]
        factor += 1
    return ways


def bounded_ranks(dims: Sequence[int], rank: int) -> tuple[int, ...]:
    """r_0, ..., r_K: ``rank``, or what a tensor of these dimensions can have at most where that is less."""
    inner = [min(rank, math.prod(dims[:k]), math.prod(dims[k:])) for k in range(1, len(dims))]
    return (1, *inner, 1)


def gaussian_cores(dims: Sequence[int], ranks: Sequence[int], std: float, like: Tensor) -> list[Tensor]:
    """Random cores whose tensor has mean 0 and standard deviation ``std`` in each entry; dtype and device of ``like``.

    G_k has the variance std^(2 / K) / r_k, as in the published code: an entry of T is a sum of r_1 ... r_{K-1} products
    of independent numbers, whose variances add up to std^2. Drawn from the global generator.
    """
    scale = std ** (1 / len(dims))
    return [
        torch.randn(left, dim, right, dtype=like.dtype, device=like.device) * (scale / math.sqrt(right))
        for (left, right), dim in zip(itertools.pairwise(ranks), dims)
    ]


def tt_svd(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Cores for a tensor (n_1, ..., n_K), by the truncated SVDs of its unfoldings (Oseledets 2011).

    The squared error is at most the sum of the squared singular values that are cut off; with full ranks there is none.
    At each bond the root of its singular values goes to either side, so that no core is far larger than its neighbours.
    """
    exact = torch.promote_types(tensor.dtype, torch.float32)
    dims, cores, rest, scale = tensor.shape, [], tensor.to(exact).reshape(1, -1), tensor.new_ones(1, dtype=exact)
    for k, dim in enumerate(dims[:-1]):
        U, s, Vh = torch.linalg.svd(rest.reshape(ranks[k] * dim, -1), full_matrices=False)
        U, s, Vh = U[:, : ranks[k + 1]], s[: ranks[k + 1]], Vh[: ranks[k + 1]]
        root = s.clamp_min(max(torch.finfo(exact).eps * float(s[0]), torch.finfo(exact).tiny)).sqrt()
        cores.append(U.reshape(ranks[k], dim, -1) / scale[:, None, None] * root)
        rest, scale = s[:, None] * Vh, root
    cores.append((rest / scale[:, None]).reshape(ranks[-2], dims[-1], 1))
    return [core.to(tensor.dtype).contiguous() for core in cores]


def full(cores: Sequence[Tensor]) -> Tensor:
    """T (n_1, ..., n_K)."""
    out = cores[0]
    for core in cores[1:]:
        out = torch.tensordot(out, core, dims=1)
    return out.squeeze(0).squeeze(-1)
