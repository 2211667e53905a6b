"""Sketches of several linears in two launches: P = X V and dY U for all of them, then Y += dY^T (X V), Z += X^T (dY U).

The twin is ``ds_mofa.capture.sketch.Sketch.add_linear``. At a thousand tokens a training step waits for the host, and one
linear's four products cost it more than they cost the GPU.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_mofa.kernels import stages_that_fit, tile_that_fits

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ALIGNMENT = 16  # bytes of a vector load
_WIDTH = 128  # of a tile of activations; loads need no mask where it divides all widths


def launch(work: Sequence[tuple[tuple[int, int, int, int], Tensor, Tensor]], rank: int, dtype: torch.dtype) -> None:
    """Add G = dY^T X of every linear to its sketches, without forming it.

    Args:
        work: for each linear the addresses of Y, Z, U, V (fp32 sketches, factors of ``dtype``), then X (..., n) and
            dY (..., m), contiguous, of ``dtype``.
        rank: columns of the factors and sketches.
        dtype: bfloat16 or float16.
    """
    device = work[0][1].device
    table: list[int] = []
    most, widest, even = 0, 0, True
    for (Y, Z, U, V), x, dy in work:
        n, m = x.shape[-1], dy.shape[-1]
        tokens = x.numel() // n
        x_address, dy_address = x.data_ptr(), dy.data_ptr()
        table += (x_address, n, tokens, V, Z, dy_address, m, tokens, U, Y)
        most, widest = max(most, tokens), max(widest, m, n)
        even &= not ((x_address | dy_address | U | V | Y | Z) % _ALIGNMENT or (m | n) % _WIDTH)
    jobs = 2 * len(work)
    rows = _on_device(table, device)
    R = max(16, triton.next_power_of_2(rank))
    products = torch.empty(jobs, most, R, dtype=dtype, device=device)
    shape = {"RANK": rank, "R": R, "DTYPE": _DTYPES[dtype], "EVEN": even}
    block_t, block_w = tile_that_fits(device, (64, _WIDTH), lambda t, w: 2 * w * (t + R))
    stages = stages_that_fit(device, 2 * block_w * (block_t + R))
    _project_kernel[(jobs, triton.cdiv(most, block_t))](
        rows, products, most, BLOCK_T=block_t, BLOCK_W=block_w, STAGES=stages, num_warps=4, **shape
    )
    block_w, block_t = tile_that_fits(device, (64 if R <= 64 else 32, 64), lambda w, t: 2 * t * (w + R))
    stages = stages_that_fit(device, 2 * block_t * (block_w + R))
    _accumulate_kernel[(jobs, triton.cdiv(widest, block_w))](
        rows, products, most, BLOCK_T=block_t, BLOCK_W=block_w, STAGES=stages, num_warps=4, **shape
    )


_LINEAR = 10  # numbers of one linear in the table


def _on_device(table: list[int], device: torch.device) -> Tensor:
    """The table, (10 linears,) int64. A graph that is captured takes no copy from memory of the host, which may be another's by
    the time it is replayed: there kernels write it, whose arguments the graph keeps.
    """
    _warm(device)
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return torch.tensor(table, device="cpu").to(device, non_blocking=True)
    rows = torch.empty(len(table), dtype=torch.int64, device=device)
    for first in range(0, len(table), _LINEAR):
        _row_kernel[(1,)](rows, first, *table[first : first + _LINEAR])
    return rows


@functools.cache
def _warm(device: torch.device) -> None:
    """Compile the kernel that writes a table, which is too late within a capture."""
    rows = torch.empty(_LINEAR, dtype=torch.int64, device=device)
    address = rows.data_ptr()
    numbers = (address, 64, 64, address, address)
    _row_kernel[(1,)](rows, 0, *numbers, *numbers)


_NUMBERS = ["first", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]


@triton.jit(do_not_specialize=_NUMBERS)
def _row_kernel(table, first, a, b, c, d, e, f, g, h, i, j):
    at = table + first
    tl.store(at, a)
    tl.store(at + 1, b)
    tl.store(at + 2, c)
    tl.store(at + 3, d)
    tl.store(at + 4, e)
    tl.store(at + 5, f)
    tl.store(at + 6, g)
    tl.store(at + 7, h)
    tl.store(at + 8, i)
    tl.store(at + 9, j)


@triton.jit
def _job(table, job, EVEN: tl.constexpr, DTYPE: tl.constexpr):
    """One row of the table: an activation or gradient A (tokens, width), its factor and its sketch (width, rank)."""
    row = table + job * 5  # see launch
    a = tl.load(row).to(tl.pointer_type(DTYPE))
    width = tl.load(row + 1).to(tl.int32)
    tokens = tl.load(row + 2).to(tl.int32)
    factor = tl.load(row + 3).to(tl.pointer_type(DTYPE))
    sketch = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    if EVEN:
        width = tl.multiple_of(width, 16)
        a, factor, sketch = tl.multiple_of(a, 16), tl.multiple_of(factor, 16), tl.multiple_of(sketch, 16)
    return a, width, tokens, factor, sketch


@triton.jit(do_not_specialize=["most"])
def _project_kernel(
    table,
    products,
    most,
    RANK: tl.constexpr,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """products[job] = A factor, a strip of tokens a program."""
    job = tl.program_id(0)
    a, width, tokens, factor, _ = _job(table, job, EVEN, DTYPE)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(1) * BLOCK_T >= tokens:
        return
    w = tl.arange(0, BLOCK_W)
    k = tl.arange(0, R)
    at = t.to(tl.int64)[:, None] * width + w[None, :]
    total = tl.zeros([BLOCK_T, R], dtype=tl.float32)
    for first in tl.range(0, width, BLOCK_W, num_stages=STAGES):
        inside = (t < tokens)[:, None]
        rows = w + first
        if not EVEN:
            inside = inside & (rows < width)[None, :]
        x = tl.load(a + at + first, mask=inside, other=0.0)
        f = tl.load(
            factor + rows[:, None] * RANK + k[None, :], mask=(k < RANK)[None, :] & (rows < width)[:, None], other=0.0
        )
        total = tl.dot(x, f, total)
    out = products + (job.to(tl.int64) * most + t)[:, None] * R + k[None, :]
    tl.store(out, total.to(DTYPE), mask=(t < tokens)[:, None])


@triton.jit(do_not_specialize=["most"])
def _accumulate_kernel(
    table,
    products,
    most,
    RANK: tl.constexpr,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sketch += A^T products[partner], a strip of the sketch a program: no atomics, the same sum in every run."""
    job = tl.program_id(0)
    a, width, tokens, _, sketch = _job(table, job, EVEN, DTYPE)
    if tl.program_id(1) * BLOCK_W >= width:
        return
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    t = tl.arange(0, BLOCK_T)
    k = tl.arange(0, R)
    partner = products + (job ^ 1).to(tl.int64) * most * R
    total = tl.zeros([BLOCK_W, R], dtype=tl.float32)
    for first in tl.range(0, tokens, BLOCK_T, num_stages=STAGES):
        rows = t + first
        inside = (rows < tokens)[:, None]
        if EVEN:
            x = tl.load(a + rows.to(tl.int64)[:, None] * width + w[None, :], mask=inside, other=0.0)
        else:
            x = tl.load(
                a + rows.to(tl.int64)[:, None] * width + w[None, :], mask=inside & (w < width)[None, :], other=0.0
            )
        p = tl.load(partner + rows[:, None] * R + k[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(x), p, total)
    at = sketch + w[:, None] * RANK + k[None, :]
    held = (w < width)[:, None] & (k < RANK)[None, :]
    tl.store(at, tl.load(at, mask=held, other=0.0) + total, mask=held)
