"""Sketches of all experts of a stack in two launches: P = R V and Q = L U row by row, then Y += L^T P and Z += R^T Q.

The twin is a loop over the experts, as in ``ds_mofa.capture.products``. No host and no table says how many rows an expert
has: each program finds its own in ``ends``. Each launch reads every row once, which is what it costs: little beside the
products of wide experts, more beside those of narrow ones.
"""

import triton
import triton.language as tl
from torch import Tensor

from ds_mofa.kernels import on_its_device, stages_that_fit, tile_that_fits

_TILE = 64  # rows of a tile that is projected
_STRIP = 128  # columns of a sketch that a program adds to


@on_its_device
def launch(
    left: Tensor,
    right: Tensor,
    ends: Tensor,
    U: Tensor,
    V: Tensor,
    Y: Tensor,
    Z: Tensor,
    *,
    left_rows: Tensor | None = None,
    right_rows: Tensor | None = None,
) -> None:
    """Y[e] += L_e^T (R_e V[e]) and Z[e] += R_e^T (L_e U[e]) for every expert e; its gradient L_e^T R_e is not formed.

    The products in brackets are rounded to the dtype of ``left``. All sums are fp32 and in the same order in every run.
    Nothing is written for an expert without rows, and rows from ends[E - 1] on are not read. The host does not wait.

    Args:
        left: (S, m), bfloat16 or float16, rows sorted by expert: L_e are those from ends[e - 1], or 0, up to ends[e].
        right: (S, n), likewise; ``left``, ``right``, ``U`` and ``V`` are of one dtype.
        ends: (E,), int32, on the device, rising, at most S.
        U: (E, m, r).
        V: (E, n, r).
        Y: (E, m, r), fp32.
        Z: (E, n, r), fp32.
        left_rows: (S,), int32: ``left`` is (T, m) in any order, and its row for each of S; None: as above.
        right_rows: the same of ``right``. So a token that goes to eight experts stands once in memory.

    Raises:
        ValueError: a tensor is not contiguous.
    """
    indices = left_rows, right_rows
    if not all(tensor is None or tensor.is_contiguous() for tensor in (left, right, ends, U, V, Y, Z, *indices)):
        raise ValueError("the kernel reads and writes contiguous tensors: call .contiguous() on the rows")
    m, n = left.shape[1], right.shape[1]
    rows = len(left) if left_rows is None else len(left_rows)
    E, _, rank = U.shape
    if rows == 0:
        return
    R = max(16, triton.next_power_of_2(rank))
    P, Q = left.new_empty(rows, rank), left.new_empty(rows, rank)
    shape = {"RANK": rank, "R": R}
    tiles = triton.cdiv(rows, _TILE) + min(E, rows)  # each expert's last may not be full
    # The rows of a tile are fixed: 16 lets the other side alone shrink.
    _, block_w = tile_that_fits(left.device, (16, 128), lambda _, w: 2 * w * (_TILE + R))
    _project_kernel[(2 * tiles,)](
        *(left, right, *indices, ends, U, V, P, Q, E, m, n),
        EXPERTS=triton.next_power_of_2(E),
        BLOCK_T=_TILE,
        BLOCK_W=block_w,
        STAGES=stages_that_fit(left.device, 2 * block_w * (_TILE + R)),
        num_warps=4 if R <= 128 else 8,
        **shape,
    )
    strip = _STRIP if R <= 64 else 64
    block_w, block_t = tile_that_fits(left.device, (strip, 64), lambda w, t: 2 * t * (w + R))
    strips = triton.cdiv(m, block_w) + triton.cdiv(n, block_w)
    _accumulate_kernel[(E * strips,)](
        *(left, right, *indices, ends, P, Q, Y, Z, E, m, n),
        BLOCK_T=block_t,
        BLOCK_W=block_w,
        STAGES=stages_that_fit(left.device, 2 * block_t * (block_w + R)),
        num_warps=4 if R <= 32 else 8,
        **shape,
    )


@triton.jit
def _rows_of(ends, expert):
    """The first row of an expert, and the one after its last."""
    return tl.load(ends + expert - 1, mask=expert > 0, other=0), tl.load(ends + expert)


@triton.jit
def _expert_of(tile, ends, E, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """The expert of a tile, where every expert has as many as hold its rows, and the tile's number among them.

    The expert is E or more for a tile that none has.
    """
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, mask=e < E, other=0)
    first = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    until = tl.cumsum((end - first + BLOCK_T - 1) // BLOCK_T, 0)
    # Those beyond E have no tiles: ``first`` and ``end`` are both 0.
    passed = until <= tile
    return tl.sum(passed.to(tl.int32), 0), tile - tl.max(tl.where(passed, until, 0), 0)


@triton.jit
def _source(left_rows, right_rows, t, stop, is_left):
    """The rows of ``left`` or ``right`` that rows t are."""
    row = t
    if left_rows is not None:
        row = tl.where(is_left, tl.load(left_rows + t, mask=is_left & (t < stop), other=0), row)
    if right_rows is not None:
        row = tl.where(is_left, row, tl.load(right_rows + t, mask=(not is_left) & (t < stop), other=0))
    return row


@triton.jit(do_not_specialize=["E"])
def _project_kernel(
    left,
    right,
    left_rows,
    right_rows,
    ends,
    U,
    V,
    P,
    Q,
    E,
    m,
    n,
    RANK: tl.constexpr,
    R: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """P = right V, then Q = left U, of each tile's expert; a tile of rows a program."""
    # One side after the other: tokens that many rows share stay in the cache.
    tiles = tl.num_programs(0) // 2
    is_left = tl.program_id(0) >= tiles
    expert, number = _expert_of(tl.program_id(0) % tiles, ends, E, EXPERTS, BLOCK_T)
    if expert >= E:
        return
    first, stop = _rows_of(ends, expert)
    first += number * BLOCK_T
    t = first + tl.arange(0, BLOCK_T)
    source = _source(left_rows, right_rows, t, stop, is_left)
    # Branches that choose arguments, not loops: each loop would have shared memory of its own.
    if is_left:
        a, factor, product, width = left, U, Q, m
    else:
        a, factor, product, width = right, V, P, n
    w = tl.arange(0, BLOCK_W)
    k = tl.arange(0, R)
    a += source.to(tl.int64)[:, None] * width + w[None, :]
    factor += expert.to(tl.int64) * width * RANK + (w * RANK)[:, None] + k[None, :]
    total = tl.zeros([BLOCK_T, R], dtype=tl.float32)
    for at in tl.range(0, width, BLOCK_W, num_stages=STAGES):
        inside = w + at < width
        x = tl.load(a + at, mask=(t < stop)[:, None] & inside[None, :], other=0.0)
        f = tl.load(factor + at * RANK, mask=inside[:, None] & (k < RANK)[None, :], other=0.0)
        total = tl.dot(x, f, total)
    product += t.to(tl.int64)[:, None] * RANK + k[None, :]
    tl.store(product, total.to(product.dtype.element_ty), mask=(t < stop)[:, None] & (k < RANK)[None, :])


@triton.jit(do_not_specialize=["E"])
def _accumulate_kernel(
    left,
    right,
    left_rows,
    right_rows,
    ends,
    P,
    Q,
    Y,
    Z,
    E,
    m,
    n,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Y += left^T P, then Z += right^T Q; a strip of one expert's sketch a program."""
    lefts = E * tl.cdiv(m, BLOCK_W)
    is_left = tl.program_id(0) < lefts
    if is_left:
        a, product, sketch, width, program = left, P, Y, m, tl.program_id(0)
    else:
        a, product, sketch, width, program = right, Q, Z, n, tl.program_id(0) - lefts
    # From the last row to the first: those that were projected last are in the cache.
    strips = tl.cdiv(width, BLOCK_W)
    expert = E - 1 - program // strips
    strip = program % strips
    first, stop = _rows_of(ends, expert)
    if first == stop:
        return
    w = strip * BLOCK_W + tl.arange(0, BLOCK_W)
    k = tl.arange(0, R)
    total = tl.zeros([BLOCK_W, R], dtype=tl.float32)
    for at in tl.range(first, stop, BLOCK_T, num_stages=STAGES):
        t = at + tl.arange(0, BLOCK_T)
        source = _source(left_rows, right_rows, t, stop, is_left).to(tl.int64)[:, None]
        x = tl.load(a + source * width + w[None, :], mask=(t < stop)[:, None] & (w < width)[None, :], other=0.0)
        p = tl.load(
            product + t.to(tl.int64)[:, None] * RANK + k[None, :],
            mask=(t < stop)[:, None] & (k < RANK)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(x), p, total)
    sketch += expert.to(tl.int64) * width * RANK + (w * RANK)[:, None] + k[None, :]
    held = (w < width)[:, None] & (k < RANK)[None, :]
    tl.store(sketch, tl.load(sketch, mask=held, other=0.0) + total, mask=held)
