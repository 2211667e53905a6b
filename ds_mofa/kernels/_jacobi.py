"""The Triton side of :mod:`ds_mofa.kernels.svd`."""

import triton
import triton.language as tl
from torch import Tensor

from ds_mofa.kernels import on_its_device

_ELEMENTS = 4096  # of one tile of columns; keeps the four tiles of a round in registers


@on_its_device
def launch(columns: Tensor, rotations: Tensor, max_sweeps: int, tolerance: float) -> None:
    """Rotate ``columns`` (B, n, p), the columns of B matrices, until orthogonal, and ``rotations`` (B, n, n) along.

    In place, fp32, n even. Columns that are zero to rounding need not become orthogonal.
    """
    floor = columns.square().sum((-2, -1)) * 1e-14
    B, n, p = columns.shape
    width = triton.next_power_of_2(max(n, p))
    pairs = max(1, min(triton.next_power_of_2(n // 2), _ELEMENTS // width))
    _jacobi_kernel[(B,)](
        columns, rotations, floor, n, p, max_sweeps, tolerance**2, PAIRS=pairs, WIDTH=width, num_warps=8
    )


@triton.jit
def _rotate(base, i, j, length, cosine, sine, valid, WIDTH: tl.constexpr):
    e = tl.arange(0, WIDTH)
    mask = valid[:, None] & (e < length)[None, :]
    at_i = base + i[:, None] * length + e[None, :]
    at_j = base + j[:, None] * length + e[None, :]
    x = tl.load(at_i, mask=mask, other=0.0)
    y = tl.load(at_j, mask=mask, other=0.0)
    tl.store(at_i, cosine[:, None] * x - sine[:, None] * y, mask=mask)
    tl.store(at_j, sine[:, None] * x + cosine[:, None] * y, mask=mask)


@triton.jit
def _jacobi_kernel(
    columns,
    rotations,
    floors,
    n: tl.constexpr,
    p: tl.constexpr,
    max_sweeps,
    tolerance_squared,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    batch = tl.program_id(0)
    floor = tl.load(floors + batch)
    columns += batch * n * p
    rotations += batch * n * n
    e = tl.arange(0, WIDTH)
    sweep = 0
    worst = tolerance_squared + 1.0
    while (sweep < max_sweeps) & (worst > tolerance_squared):
        cosines = tl.zeros([PAIRS], dtype=tl.float32)
        for round in range(n - 1):
            for first in range(0, n // 2, PAIRS):
                # A round-robin tournament: column n - 1 stays, the others go round, all pairs meet in n - 1 rounds.
                k = first + tl.arange(0, PAIRS)
                valid = k < n // 2
                i = (round + k) % (n - 1)
                j = tl.where(k == 0, n - 1, (round - k + n - 1) % (n - 1))
                i = tl.where(valid, i, 0)
                j = tl.where(valid, j, 0)
                mask = valid[:, None] & (e < p)[None, :]
                x = tl.load(columns + i[:, None] * p + e[None, :], mask=mask, other=0.0)
                y = tl.load(columns + j[:, None] * p + e[None, :], mask=mask, other=0.0)
                xx = tl.sum(x * x, axis=1)
                yy = tl.sum(y * y, axis=1)
                xy = tl.sum(x * y, axis=1)
                # The squares of columns below 1e-19 of the rest underflow: they count as orthogonal.
                cosine_squared = tl.where(xx * yy > 0, xy / tl.maximum(xx, 1e-37) * (xy / tl.maximum(yy, 1e-37)), 0.0)
                cosines = tl.maximum(cosines, tl.where(tl.minimum(xx, yy) > floor, cosine_squared, 0.0))
                turn = cosine_squared > 0
                zeta = (yy - xx) / tl.where(turn, 2.0 * xy, 1.0)
                t = tl.where(zeta >= 0, 1.0, -1.0) / (tl.abs(zeta) + tl.sqrt(1.0 + zeta * zeta))
                t = tl.where(turn, t, 0.0)
                c = 1.0 / tl.sqrt(1.0 + t * t)
                s = c * t
                tl.store(columns + i[:, None] * p + e[None, :], c[:, None] * x - s[:, None] * y, mask=mask)
                tl.store(columns + j[:, None] * p + e[None, :], s[:, None] * x + c[:, None] * y, mask=mask)
                _rotate(rotations, i, j, n, c, s, valid, WIDTH)
            tl.debug_barrier()
        worst = tl.max(cosines, axis=0)
        sweep += 1
