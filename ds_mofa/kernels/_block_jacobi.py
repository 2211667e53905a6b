"""The Triton side of the block Jacobi sweeps in :mod:`ds_mofa.kernels.svd`."""

import triton
import triton.language as tl
from torch import Tensor

from ds_mofa.kernels import on_its_device

_CHUNK = 32  # elements of a row that are multiplied at a time: as many as the registers of one warp hold


@on_its_device
def launch_round(
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
    """:func:`ds_mofa.kernels.svd.rotate_twin` on a GPU: one program for each pair of blocks of each matrix."""
    B, n, length = rows.shape
    _round_kernel[(n // (2 * block), B)](
        rows,
        worst,
        n,
        p,
        length,
        sweep,
        turn,
        tolerance**2,
        floor,
        SIZE=2 * block,
        CHUNK=_CHUNK,
        num_warps=1,  # two are slower, and four
    )


@triton.jit(do_not_specialize=["sweep", "turn"])
def _round_kernel(
    rows,
    worst_ptr,
    n,
    p,
    length,
    sweep,
    turn,
    tolerance_squared,
    floor,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    batch = tl.program_id(1)
    worst_ptr += sweep * tl.num_programs(1) + batch
    if tl.load(worst_ptr) <= tolerance_squared:  # this matrix was done a sweep ago
        return
    rows += batch.to(tl.int64) * n * length
    worst = _meet(rows, n, p, length, turn, tl.program_id(0), floor, SIZE, CHUNK)
    tl.atomic_max(worst_ptr + tl.num_programs(1), worst)


@triton.jit
def _meet(
    rows,
    n,
    p,
    length,
    turn,
    pair,
    floor,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rotate the rows of one pair of blocks of one matrix; returns the largest squared cosine that it found."""
    BLOCK: tl.constexpr = SIZE // 2
    # A round-robin tournament: the last block stays, the others go round, all pairs meet in n / BLOCK - 1 rounds.
    others = n // BLOCK - 1
    one = (turn + pair) % others
    two = tl.where(pair == 0, others, (turn - pair + others) % others)
    low = tl.minimum(one, two)
    high = tl.maximum(one, two)
    i = tl.arange(0, SIZE)
    e = tl.arange(0, CHUNK)
    at = (tl.where(i < BLOCK, low * BLOCK, (high - 1) * BLOCK) + i) * length

    # A: the Gram matrix of the pair's columns of K, which are the first p elements of the rows.
    A = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    for start in range(0, p, CHUNK):
        X = tl.load(rows + at[:, None] + (start + e)[None, :], mask=(start + e < p)[None, :], other=0.0)
        A = tl.dot(X, tl.trans(X), A, input_precision="ieee")
    diagonal = i[:, None] == i[None, :]
    mine = tl.sum(tl.where(diagonal, A, 0.0), axis=1)
    across = tl.sum(tl.where(diagonal, A, 0.0), axis=0)
    counted = (mine > floor)[:, None] & (across > floor)[None, :] & (i[:, None] != i[None, :])
    cosine_squared = A / tl.maximum(mine, 1e-37)[:, None] * (A / tl.maximum(across, 1e-37)[None, :])
    worst = tl.max(tl.max(tl.where(counted, cosine_squared, 0.0), axis=1), axis=0)

    # Two-sided Jacobi on A, whose diagonal is kept in ``mine``; the rows of W are the rotations so far.
    W = tl.where(diagonal, 1.0, 0.0)
    for step in range(1, SIZE):
        # Row i meets row i ^ step: every pair once.
        partner = i ^ step
        is_low = i < partner
        index = tl.broadcast_to(partner[:, None], [SIZE, SIZE])
        theirs = tl.gather(mine, partner, 0)
        product = tl.sum(tl.where(i[None, :] == partner[:, None], A, 0.0), axis=1)
        # A is symmetric to rounding only, and both partners must see the same number.
        product = tl.where(is_low, product, tl.gather(product, partner, 0))
        top = tl.where(is_low, mine, theirs)
        bottom = tl.where(is_low, theirs, mine)
        turns = tl.abs(product) > 1e-30
        zeta = (bottom - top) / tl.where(turns, 2.0 * product, 1.0)
        t = tl.where(zeta >= 0, 1.0, -1.0) / (tl.abs(zeta) + tl.sqrt(1.0 + zeta * zeta))
        t = tl.where(turns, t, 0.0)
        # Rounded to nearest: thousands of rotations must not all lengthen the rows, or all shorten them.
        c = tl.div_rn(1.0, tl.sqrt_rn(1.0 + t * t))
        s = c * t
        # The longer of two columns goes to the front: sorted columns need fewer sweeps.
        swap = bottom > top
        c, s = tl.where(swap, s, c), tl.where(swap, -c, s)
        s = tl.where(is_low, -s, s)
        mine = tl.where(is_low != swap, top - t * product, bottom + t * product)
        W = c[:, None] * W + s[:, None] * tl.gather(W, index, 0)
        A = tl.trans(c[:, None] * A + s[:, None] * tl.gather(A, index, 0))
        A = c[:, None] * A + s[:, None] * tl.gather(A, index, 0)

    for start in range(0, length, CHUNK):
        inside = (start + e < length)[None, :]
        X = tl.load(rows + at[:, None] + (start + e)[None, :], mask=inside, other=0.0)
        tl.store(rows + at[:, None] + (start + e)[None, :], tl.dot(W, X, input_precision="ieee"), mask=inside)
    return worst
