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

from ds_mofa.kernels import multiprocessors, on, stages_that_fit, tile_that_fits
from ds_mofa.kernels._launching import Compiled

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
    programs = min(jobs * triton.cdiv(most, _TOKENS), multiprocessors(device))
    project, accumulate = _kernels(device, rank, dtype, even, programs, len(work) == 1)
    strips = triton.cdiv(most, project.constants["BLOCK_T"]), triton.cdiv(widest, accumulate.constants["BLOCK_W"])
    products = torch.empty(jobs, most, project.constants["R"], dtype=dtype, device=device)
    with on(device):
        rows = (products, *table) if len(work) == 1 else (_on_device(table, device), *_NONE)
        project((jobs, strips[0]), *rows, products, most)
        accumulate((jobs, strips[1]), *rows, products, most)


_TOKENS = 64  # of a tile of activations, where there are enough of them for all of the device
_LINEAR = 10  # numbers of one linear in the table
_NONE = (0,) * _LINEAR


@functools.cache
def _kernels(
    device: torch.device, rank: int, dtype: torch.dtype, even: bool, programs: int, alone: bool
) -> tuple[Compiled, Compiled]:
    """The kernel that projects, in strips of BLOCK_T tokens, and the one that sums, in strips of BLOCK_W columns.

    Args:
        programs: how many project, with tiles of ``_TOKENS``; where half of the device would be idle, tiles are smaller.
        alone: they take one linear, without a table.
    """
    R = max(16, triton.next_power_of_2(rank))
    shape = {"RANK": rank, "R": R, "DTYPE": _DTYPES[dtype], "EVEN": even, "ALONE": alone, "num_warps": 4}
    tokens = _TOKENS
    while tokens > 16 and 2 * programs <= multiprocessors(device):
        tokens, programs = tokens // 2, 2 * programs
    block_t, block_w = tile_that_fits(device, (tokens, _WIDTH), lambda t, w: 2 * w * (t + R))
    stages = stages_that_fit(device, 2 * block_w * (block_t + R))
    project = Compiled(_project_kernel, BLOCK_T=block_t, BLOCK_W=block_w, STAGES=stages, **shape)
    block_w, block_t = tile_that_fits(device, (64 if R <= 64 else 32, 64), lambda w, t: 2 * t * (w + R))
    stages = stages_that_fit(device, 2 * block_t * (block_w + R))
    return project, Compiled(_accumulate_kernel, BLOCK_T=block_t, BLOCK_W=block_w, STAGES=stages, **shape)


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


# Of two rows: address of an activation or gradient, its width and tokens, addresses of its factor and its sketch.
_NUMBERS = ["a0", "w0", "t0", "f0", "s0", "a1", "w1", "t1", "f1", "s1"]


@triton.jit(do_not_specialize=["first", *_NUMBERS])
def _row_kernel(table, first, a0, w0, t0, f0, s0, a1, w1, t1, f1, s1):
    """The rows of one linear, from ``first`` on."""
    at = table + first
    tl.store(at, a0)
    tl.store(at + 1, w0)
    tl.store(at + 2, t0)
    tl.store(at + 3, f0)
    tl.store(at + 4, s0)
    tl.store(at + 5, a1)
    tl.store(at + 6, w1)
    tl.store(at + 7, t1)
    tl.store(at + 8, f1)
    tl.store(at + 9, s1)


@triton.jit
def _in_table(table, job):
    """One row of the table: an activation or gradient A (tokens, width), its factor and its sketch (width, rank)."""
    row = table + job * 5  # see launch
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def _of_two(job, a0, w0, t0, f0, s0, a1, w1, t1, f1, s1):
    """The first row or the second."""
    address, width, tokens = a0 + (a1 - a0) * job, w0 + (w1 - w0) * job, t0 + (t1 - t0) * job
    return address, width, tokens, f0 + (f1 - f0) * job, s0 + (s1 - s0) * job


@triton.jit
def _aligned(a, factor, sketch, width, EVEN: tl.constexpr, DTYPE: tl.constexpr):
    """Addresses as pointers, with what is known of them."""
    a = a.to(tl.int64).to(tl.pointer_type(DTYPE))
    factor = factor.to(tl.int64).to(tl.pointer_type(DTYPE))
    sketch = sketch.to(tl.int64).to(tl.pointer_type(tl.float32))
    width = width.to(tl.int32)
    if EVEN:
        width = width // 16 * 16  # where hints of what comes from a call are lost
        a, factor, sketch = tl.multiple_of(a, 16), tl.multiple_of(factor, 16), tl.multiple_of(sketch, 16)
    return a, factor, sketch, width


@triton.jit(do_not_specialize=["most", *_NUMBERS])
def _project_kernel(
    table,
    a0,
    w0,
    t0,
    f0,
    s0,
    a1,
    w1,
    t1,
    f1,
    s1,
    products,
    most,
    RANK: tl.constexpr,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
    EVEN: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """products[job] = A factor, a strip of tokens a program; if ALONE, rows are arguments, else of a table."""
    job = tl.program_id(0)
    if ALONE:
        address, width, tokens, factor, sketch = _of_two(job, a0, w0, t0, f0, s0, a1, w1, t1, f1, s1)
    else:
        address, width, tokens, factor, sketch = _in_table(table, job)
    activations, factor, sketch, width = _aligned(address, factor, sketch, width, EVEN, DTYPE)
    tokens = tokens.to(tl.int32)
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
        x = tl.load(activations + at + first, mask=inside, other=0.0)
        f = tl.load(
            factor + rows[:, None] * RANK + k[None, :], mask=(k < RANK)[None, :] & (rows < width)[:, None], other=0.0
        )
        total = tl.dot(x, f, total)
    out = products + (job.to(tl.int64) * most + t)[:, None] * R + k[None, :]
    tl.store(out, total.to(DTYPE), mask=(t < tokens)[:, None])


@triton.jit(do_not_specialize=["most", *_NUMBERS])
def _accumulate_kernel(
    table,
    a0,
    w0,
    t0,
    f0,
    s0,
    a1,
    w1,
    t1,
    f1,
    s1,
    products,
    most,
    RANK: tl.constexpr,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
    EVEN: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sketch += A^T products[partner], a strip of the sketch a program: no atomics, the same sum in every run."""
    job = tl.program_id(0)
    if ALONE:
        address, width, tokens, factor, sketch = _of_two(job, a0, w0, t0, f0, s0, a1, w1, t1, f1, s1)
    else:
        address, width, tokens, factor, sketch = _in_table(table, job)
    activations, factor, sketch, width = _aligned(address, factor, sketch, width, EVEN, DTYPE)
    tokens = tokens.to(tl.int32)
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
            x = tl.load(activations + rows.to(tl.int64)[:, None] * width + w[None, :], mask=inside, other=0.0)
        else:
            x = tl.load(
                activations + rows.to(tl.int64)[:, None] * width + w[None, :],
                mask=inside & (w < width)[None, :],
                other=0.0,
            )
        p = tl.load(partner + rows[:, None] * R + k[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(x), p, total)
    at = sketch + w[:, None] * RANK + k[None, :]
    held = (w < width)[:, None] & (k < RANK)[None, :]
    tl.store(at, tl.load(at, mask=held, other=0.0) + total, mask=held)
