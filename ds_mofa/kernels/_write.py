"""W <- decay W - step_size U diag(c) V^T in one pass over W: tile by tile, rounded stochastically on the way out.

The twin is ``ds_mofa.weights._write_one``; the random bits are those of ``ds_mofa.weights.random_bits``.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ds_mofa.weights import Rounding, Shard

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launch(
    shards: Sequence["Shard"],
    U: Tensor,
    V: Tensor,
    coefficients: Tensor,
    indices: Sequence[int],
    step_size: float,
    decay: float,
    rounding: "Rounding",
    masters: Sequence[Tensor] | None,
) -> None:
    """The work of ``write_updates`` on a GPU, one launch for all matrices."""
    start, numel, dtype = shards[0].start, shards[0].flat.numel(), shards[0].flat.dtype
    if numel == 0:
        return
    (_, m, r), n = U.shape, V.shape[1]
    device = U.device
    weights = _table(tuple(shard.flat.data_ptr() for shard in shards), device)
    master_table = weights if masters is None else _table(tuple(master.data_ptr() for master in masters), device)
    first_row, last_row = start // n, -(-(start + numel) // n)
    stochastic = rounding.stochastic and dtype != torch.float32
    # Two bf16 weights are one word: half the hashing, and no shuffling between threads.
    in_pairs = dtype == torch.bfloat16 and stochastic and n % 2 == 0 and start % 2 == 0
    in_pairs = in_pairs and all(shard.flat.data_ptr() % 4 == 0 for shard in shards)
    kernel, block_n = (_write_pairs_kernel, 128) if in_pairs else (_write_kernel, 256)
    block_m = 32
    grid = (triton.cdiv(n // 2 if in_pairs else n, block_n), triton.cdiv(last_row - first_row, block_m), len(shards))
    flags = {} if in_pairs else {"DTYPE": _DTYPES[dtype], "STOCHASTIC": stochastic, "MASTER": masters is not None}
    kernel[grid](
        weights,
        master_table,
        U,
        V,
        coefficients,
        _table(tuple(indices), device),
        m,
        n,
        r,
        first_row,
        start,
        start + numel,
        step_size,
        decay,
        rounding.seed,
        rounding.step,
        R=max(16, triton.next_power_of_2(r)),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PRECISION="ieee" if U.dtype == torch.float32 else "tf32",  # tf32 holds every 16-bit number
        num_warps=8,
        **flags,
    )


@functools.lru_cache(maxsize=1024)
def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses or indices on the device; they are the same in every step."""
    return torch.tensor(values, dtype=torch.int64, device=device)


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _row_words(row, indices, batch, seed, step):
    index = tl.load(indices + batch).to(tl.uint32)
    first = _mix(seed.to(tl.uint32) + (index + 1) * 0x9E3779B9)
    second = _mix(first + step.to(tl.uint32))
    return _mix(_mix(row.to(tl.uint32) ^ first) + second)


@triton.jit(do_not_specialize=["first_row", "start", "stop", "seed", "step"])
def _write_kernel(
    weights,
    masters,
    U,
    V,
    coefficients,
    indices,
    m,
    n,
    r,
    first_row,
    start,
    stop,
    step_size,
    decay,
    seed,
    step,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASTER: tl.constexpr,
):
    """Any dtype, any range; a master or not."""
    batch = tl.program_id(2).to(tl.int64)
    row = first_row + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, R)

    in_u = (row < m)[:, None] & (k < r)[None, :]
    in_v = (col < n)[:, None] & (k < r)[None, :]
    u = tl.load(U + batch * m * r + row[:, None] * r + k[None, :], mask=in_u, other=0.0).to(tl.float32)
    v = tl.load(V + batch * n * r + col[:, None] * r + k[None, :], mask=in_v, other=0.0).to(tl.float32)
    c = tl.load(coefficients + batch * r + k, mask=k < r, other=0.0).to(tl.float32)
    delta = tl.dot(u * c[None, :], tl.trans(v), input_precision=PRECISION)

    at = row.to(tl.int64)[:, None] * n + col[None, :]
    held = (col < n)[None, :] & (at >= start) & (at < stop)
    weight = tl.load(weights + batch).to(tl.pointer_type(DTYPE)) + (at - start)
    if MASTER:
        master = tl.load(masters + batch).to(tl.pointer_type(tl.float32)) + (at - start)
        old = tl.load(master, mask=held, other=0.0)
    else:
        old = tl.load(weight, mask=held, other=0.0).to(tl.float32)
    new = old * decay - step_size * delta
    if MASTER:
        tl.store(master, new, mask=held)

    if STOCHASTIC:
        pair = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        word = _mix(_row_words(row, indices, batch, seed, step)[:, None] ^ pair.to(tl.uint32)[None, :])
        bits = tl.interleave(word & 0xFFFF, word >> 16)
        raw = new.to(tl.uint32, bitcast=True)
        if DTYPE == tl.bfloat16:
            new = ((raw + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            normal = ((raw + (bits >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
            smallest = 5.960464477539063e-08  # 2^-24, the spacing of fp16 below 2^-14
            steps = new / smallest
            below = tl.floor(steps)
            subnormal = (below + tl.where(bits.to(tl.float32) < (steps - below) * 65536.0, 1.0, 0.0)) * smallest
            new = tl.where(tl.abs(new) < 6.103515625e-05, subnormal, normal)
    tl.store(weight, new.to(DTYPE), mask=held)


@triton.jit(do_not_specialize=["first_row", "start", "stop", "seed", "step"])
def _write_pairs_kernel(
    weights,
    masters,
    U,
    V,
    coefficients,
    indices,
    m,
    n,
    r,
    first_row,
    start,
    stop,
    step_size,
    decay,
    seed,
    step,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """bf16 with stochastic rounding, two neighbours in a row as one 32-bit word; the same bits as above."""
    batch = tl.program_id(2).to(tl.int64)
    row = first_row + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    half = n // 2
    k = tl.arange(0, R)

    in_u = (row < m)[:, None] & (k < r)[None, :]
    in_v = (k < r)[:, None] & (pair < half)[None, :]
    u = tl.load(U + batch * m * r + row[:, None] * r + k[None, :], mask=in_u, other=0.0).to(tl.float32)
    c = tl.load(coefficients + batch * r + k, mask=k < r, other=0.0).to(tl.float32)
    u = u * c[None, :]
    columns = V + batch * n * r + pair[None, :] * (2 * r) + k[:, None]
    even = tl.dot(u, tl.load(columns, mask=in_v, other=0.0).to(tl.float32), input_precision=PRECISION)
    odd = tl.dot(u, tl.load(columns + r, mask=in_v, other=0.0).to(tl.float32), input_precision=PRECISION)

    # Rows count from the shard's first, so that 32 bits reach every word of it.
    at = (row - first_row)[:, None] * half + pair[None, :]
    low = ((start - first_row.to(tl.int64) * n) // 2).to(tl.int32)
    high = ((stop - first_row.to(tl.int64) * n) // 2).to(tl.int32)
    held = (pair < half)[None, :] & (at >= low) & (at < high)
    words = tl.load(weights + batch).to(tl.pointer_type(tl.uint32)) + (at - low)
    old = tl.load(words, mask=held, other=0)
    even = (old << 16).to(tl.float32, bitcast=True) * decay - step_size * even
    odd = (old & 0xFFFF0000).to(tl.float32, bitcast=True) * decay - step_size * odd
    bits = _mix(_row_words(row, indices, batch, seed, step)[:, None] ^ pair.to(tl.uint32)[None, :])
    even_word = (even.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) >> 16
    odd_word = (odd.to(tl.uint32, bitcast=True) + (bits >> 16)) & 0xFFFF0000
    tl.store(words, odd_word | even_word, mask=held)
