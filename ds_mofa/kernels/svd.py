"""Batched small SVD by one-sided Jacobi.

The library's batched SVD goes through one matrix after another above 32 x 32: 226 ms for the 224 cores of an
8B model at rank 32. One-sided Jacobi (Hestenes) orthogonalises the columns of K by plane rotations of disjoint
pairs, and needs nothing but dot products: K J -> columns P sigma, J -> Q.

Small matrices stay in the cache and are rotated column by column, one thread block a matrix. Larger ones are
rotated by pairs of *blocks* of columns: the Gram matrix of such a pair is small, its rotations are found in
registers, and their product is applied to the long columns at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["jacobi_svd", "jacobi_svd_twin", "rotations"]

_BY_COLUMNS = 64  # up to this many columns

_MAX_SWEEPS = 16  # column by column, 6 to 9 are used; a matrix that needs more is not getting better
_TOLERANCE = 1e-6  # cosine between two columns that counts as orthogonal, in fp32

_BLOCK = 16
# By blocks: sweeps, and the largest cosine *before* the last of them, which leaves about its square. The first
# pass takes 5 to 10; the second starts from rotations made orthonormal again and needs one, or two.
_PASSES = ((14, 1e-2), (3, 1e-3))
_FLOOR = 1e-12  # |column|^2 / |K|^2 below which a column is rounding, and its direction no matter


def jacobi_svd(K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K Q, sigma, Q of K (B, p, q) on a GPU, fp32, sigma descending. Does not wait for the device.

    Returns:
        K Q: (B, p, q), the left singular vectors times sigma; zero where sigma is.
        sigma: (B, q).
        Q: (B, q, q), orthonormal for every K.
    """
    return _sorted_triplets(K, rotations(K))


def jacobi_svd_twin(K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`jacobi_svd` returns, from the library's SVD."""
    _, sigma, Qt = torch.linalg.svd(K, full_matrices=True)
    sigma = torch.nn.functional.pad(sigma, (0, K.shape[-1] - sigma.shape[-1]))
    return K @ Qt.mT, sigma, Qt.mT


def rotations(K: Tensor) -> Tensor:
    """Q (B, q, q), orthonormal, such that the columns of K Q are orthogonal, for K (B, p, q) on a GPU, fp32."""
    return rotations_by_columns(K) if K.shape[-1] <= _BY_COLUMNS else rotations_by_blocks(K, _sweeps)


def rotations_by_columns(K: Tensor) -> Tensor:
    """:func:`rotations`, all columns with all others, in one launch."""
    from ds_mofa.kernels import _jacobi

    B, p, q = K.shape
    even = q + q % 2  # a zero column plays with the odd one out
    columns = K.new_zeros(B, even, p)
    columns[:, :q] = _normalised(K).mT
    turned = torch.eye(even, dtype=K.dtype, device=K.device).repeat(B, 1, 1)
    _jacobi.launch(columns, turned, _MAX_SWEEPS, _TOLERANCE)
    return _orthonormalised(turned[:, :q, :q].mT)  # the zero column has turned with none


Sweeps = Callable[[Tensor, Tensor, int, float], None]  # rows, worst, p, tolerance


def rotations_by_blocks(K: Tensor, sweeps: Sweeps) -> Tensor:
    """Like :func:`rotations_by_columns`, by pairs of blocks of columns; fp32, on any device that ``sweeps`` serves.

    The work is done on rows [column of K, row of Q^T], (B, n, p + q): a rotation turns both parts alike. Zero rows
    fill n up to whole pairs of blocks.
    """
    B, p, q = K.shape
    n = q + -q % (2 * _BLOCK)
    K = _normalised(K)
    Q = torch.eye(q, dtype=K.dtype, device=K.device).expand(B, q, q)
    for max_sweeps, tolerance in _PASSES:
        # Hundreds of products have moved the columns away from K Q, in the sixth digit: take them anew.
        columns = K @ Q
        # Sorted columns need fewer sweeps.
        order = columns.square().sum(-2).argsort(dim=-1, descending=True, stable=True).unsqueeze(-1)
        rows = K.new_zeros(B, n, p + q)
        rows[:, :q] = torch.cat([columns, Q], dim=-2).mT.gather(-2, order.expand(B, q, p + q))
        worst = K.new_zeros(max_sweeps + 1, B)
        worst[0] = torch.inf
        sweeps(rows, worst, p, tolerance)
        turned = rows[:, :, p:]
        if n > q:  # the zero rows have turned with none, but may have changed places
            order = turned.square().sum(-1).argsort(dim=-1, descending=True, stable=True)[:, :q].unsqueeze(-1)
            turned = turned.gather(-2, order.expand(B, q, q))
        Q = _orthonormalised(turned.mT)
    return Q


def _sweeps(rows: Tensor, worst: Tensor, p: int, tolerance: float) -> None:
    """Sweep over ``rows`` (B, n, length) until their first p elements are orthogonal, in place.

    A sweep is n / block - 1 rounds, in which every block of rows meets every other one once. Each round is a
    launch, and one that finds its matrix done does nothing: the host need not know.

    Args:
        rows: fp32, n a multiple of twice the block.
        worst: (max_sweeps + 1, B) fp32. ``worst[s]`` becomes the largest squared cosine that sweep s met,
            counted from 1; inf in ``worst[0]`` and 0 elsewhere to start with.
        p: how many elements of a row count for its length and direction.
        tolerance: a sweep that has met no larger cosine is the last.
    """
    from ds_mofa.kernels import _block_jacobi

    _each_round(rows, worst, p, tolerance, _block_jacobi.launch_round)


def sweeps_twin(rows: Tensor, worst: Tensor, p: int, tolerance: float) -> None:
    """What :func:`_sweeps` does, in PyTorch."""
    _each_round(rows, worst, p, tolerance, rotate_twin)


def _each_round(rows: Tensor, worst: Tensor, p: int, tolerance: float, rotate: Callable[..., None]) -> None:
    for sweep in range(worst.shape[0] - 1):
        for turn in range(rows.shape[-2] // _BLOCK - 1):
            rotate(rows, worst, sweep, turn, p=p, block=_BLOCK, tolerance=tolerance, floor=_FLOOR)


def rotate_twin(
    rows: Tensor,
    worst: Tensor,
    sweep: int,
    turn: int,
    *,
    p: int,
    block: int,
    tolerance: float,
    floor: float,
) -> None:
    """One round of one sweep: the pairs of blocks that meet in it rotate their rows, in place.

    A pair's rows X (2 block, length) become W X, with W orthonormal: the product of the plane rotations that
    zero one element after another of X X^T over the first p elements (cyclic Jacobi, in the order i, i ^ step).
    """
    index = torch.tensor(pairs(rows.shape[-2] // block, turn), device=rows.device)  # (pairs, 2)
    index = (index.unsqueeze(-1) * block + torch.arange(block, device=rows.device)).flatten(1)  # (pairs, 2 block)
    X = rows[:, index]
    A = X[..., :p] @ X[..., :p].mT
    todo = worst[sweep] > tolerance**2
    worst[sweep + 1] = torch.where(todo, torch.maximum(worst[sweep + 1], _largest_cosine(A, floor)), worst[sweep + 1])
    rows[:, index] = torch.where(todo[:, None, None, None], _jacobi_rotations(A) @ X, X)


def pairs(blocks: int, turn: int) -> list[tuple[int, int]]:
    """A round-robin tournament: the last block stays, the others go round; all have met after ``blocks - 1`` turns."""
    others = blocks - 1
    met = [(turn % others, others)]
    met += [((turn + k) % others, (turn - k) % others) for k in range(1, blocks // 2)]
    return [(min(pair), max(pair)) for pair in met]


def _largest_cosine(A: Tensor, floor: float) -> Tensor:
    """(B,): the largest squared cosine between rows of more than floor, from their Gram matrices A (B, ..., s, s)."""
    squares = A.diagonal(dim1=-2, dim2=-1)
    counted = (squares > floor).unsqueeze(-1) & (squares > floor).unsqueeze(-2)
    counted = counted & ~torch.eye(A.shape[-1], dtype=torch.bool, device=A.device)
    lengths = squares.clamp_min(1e-37)
    return torch.where(counted, A / lengths.unsqueeze(-1) * (A / lengths.unsqueeze(-2)), 0).flatten(1).amax(-1)


def _jacobi_rotations(A: Tensor) -> Tensor:
    """W (..., s, s), orthonormal, that brings A (..., s, s), symmetric, nearer to the diagonal: W A W^T."""
    i = torch.arange(A.shape[-1], device=A.device)
    W = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    squares = A.diagonal(dim1=-2, dim2=-1)
    for step in range(1, A.shape[-1]):
        partner = i ^ step
        low = torch.minimum(i, partner)
        high = torch.maximum(i, partner)
        product, top, bottom = A[..., low, high], squares[..., low], squares[..., high]
        turns = product.abs() > 1e-30
        zeta = (bottom - top) / torch.where(turns, 2 * product, 1)
        t = torch.where(zeta >= 0, 1, -1) / (zeta.abs() + (1 + zeta * zeta).sqrt())
        t = torch.where(turns, t, 0)
        c = 1 / (1 + t * t).sqrt()
        s = c * t
        # The longer of two rows goes to the front: sorted rows need fewer sweeps.
        swap = bottom > top
        c, s = torch.where(swap, s, c), torch.where(swap, -c, s)
        s = torch.where(i < partner, -s, s)
        squares = torch.where((i < partner) != swap, top - t * product, bottom + t * product)
        W = c.unsqueeze(-1) * W + s.unsqueeze(-1) * W[..., partner, :]
        A = (c.unsqueeze(-1) * A + s.unsqueeze(-1) * A[..., partner, :]).mT
        A = c.unsqueeze(-1) * A + s.unsqueeze(-1) * A[..., partner, :]
    return W


def _normalised(K: Tensor) -> Tensor:
    """K / |K|, zero for zero: squares of its elements then neither overflow nor, where they matter, underflow."""
    norm = torch.linalg.vector_norm(K, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    return K / torch.where(norm > 0, norm, 1).to(K.dtype)


def _orthonormalised(Q: Tensor) -> Tensor:
    """One Newton-Schulz step: thousands of rotations change lengths in the fifth digit."""
    return 1.5 * Q - 0.5 * Q @ (Q.mT @ Q)


def _sorted_triplets(K: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    turned = K @ Q
    # In float64: the squares of a tiny core's columns are zero in fp32.
    lengths = torch.linalg.vector_norm(turned, dim=-2, dtype=torch.float64).to(K.dtype)
    sigma, order = lengths.sort(dim=-1, descending=True, stable=True)
    order = order.unsqueeze(-2)
    return turned.gather(-1, order.expand_as(turned)), sigma, Q.gather(-1, order.expand_as(Q))
