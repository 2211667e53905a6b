"""Weights of eight bits on a GPU: widened for a product, and written by an update in one pass over them.

The twins are :func:`ds_mofa.kernels.int8.widened` and ``ds_mofa.weights.int8.write_one``; the random bits are those of
:func:`ds_mofa.kernels.random_bits.random_bits`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_mofa.kernels import tile_that_fits
from ds_mofa.kernels._write import _any, _mix, _product, _turned, addresses, check_count, keys_of
from ds_mofa.kernels.random_bits import Rounding
from ds_mofa.kernels.shard import Shard

_WIDENED = 8192  # weights by one program
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def widen(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`ds_mofa.kernels.int8.widened`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    count = codes.numel()
    if count:
        grid = (triton.cdiv(count, _WIDENED),)
        _widen_kernel[grid](codes, exponents, out, count, DTYPE=_DTYPES[dtype], BLOCK=_WIDENED, num_warps=8)
    return out


def launch(
    shards: Sequence[Shard],
    U: Tensor,
    V: Tensor,
    coefficients: Tensor,
    numbers: Tensor,
    step_size: float,
    decay: float,
    rounding: Rounding,
) -> None:
    """The work of ``ds_mofa.weights.write.write_updates`` on weights of eight bits, one launch for all matrices."""
    (B, m, r), n, device = U.shape, V.shape[1], U.device
    rows = shards[0].length // n
    if rows == 0:
        return
    check_count(B)
    codes = addresses([shard.flat for shard in shards], rows * n, device)
    exponents = addresses([_exponents(shard) for shard in shards], rows * n // 32, device)
    keys = keys_of(rounding, numbers, device) if rounding.stochastic else codes
    R = max(16, triton.next_power_of_2(r))
    row = R * U.element_size()
    block_m, block_n = tile_that_fits(device, (32, 128), lambda rows, columns: (rows + columns) * row)
    grid = (triton.cdiv(n, block_n), triton.cdiv(rows, block_m), B)
    _write_kernel[grid](
        codes,
        exponents,
        keys,
        U,
        V,
        coefficients,
        m,
        n,
        r,
        shards[0].start // n,
        rows,
        step_size,
        decay,
        rounding.turn,
        R=R,
        BLOCK_M=block_m,
        BLOCK_N=max(32, block_n),
        STOCHASTIC=rounding.stochastic,
        num_warps=8,
    )


def _exponents(shard: Shard) -> Tensor:
    assert shard.exponents is not None  # else the weights are not of eight bits
    return shard.exponents


@triton.jit
def _widen_kernel(codes, exponents, out, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    group = first // 32 + tl.arange(0, BLOCK // 32).to(tl.int64)
    at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    code = tl.load(codes + at, mask=at < count, other=0)
    scale = _scale(tl.load(exponents + group, mask=group * 32 < count, other=1))
    tl.store(out + at, (code.to(tl.float32) * scale[:, None]).to(DTYPE), mask=at < count)


@triton.jit(do_not_specialize=["first_row", "turn"])
def _write_kernel(
    codes,
    exponents,
    keys,
    U,
    V,
    coefficients,
    m,
    n,
    r,
    first_row,
    rows,
    step_size,
    decay,
    turn,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Rows [first_row, first_row + rows) of each matrix."""
    batch = tl.program_id(2).to(tl.int64)
    own = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first_row + own
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, R)
    in_u = (row < m)[:, None] & (k < r)[None, :]
    in_v = (k < r)[:, None] & (col < n)[None, :]
    u = tl.load(U + batch * m * r + row[:, None] * r + k[None, :], mask=in_u, other=0.0)
    v = tl.load(V + batch * n * r + col[None, :] * r + k[:, None], mask=in_v, other=0.0)
    c = tl.load(coefficients + batch * r + k, mask=k < r, other=0.0)
    delta = _product((u.to(tl.float32) * c.to(tl.float32)[None, :]).to(u.dtype), v)

    moving = _any(c)
    held = tl.where(moving, own < rows, False)[:, None] & (col < n)[None, :]
    place = own.to(tl.int64)[:, None] * n + col[None, :]
    code_at = tl.load(codes + batch).to(tl.pointer_type(tl.int8)) + place
    group = tl.program_id(0) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    held_group = tl.where(moving, own < rows, False)[:, None] & (group < n // 32)[None, :]
    group_place = own.to(tl.int64)[:, None] * (n // 32) + group[None, :]
    exponent_at = tl.load(exponents + batch).to(tl.pointer_type(tl.uint8)) + group_place

    old = tl.load(code_at, mask=held, other=0).to(tl.float32).reshape(BLOCK_M, BLOCK_N // 32, 32)
    old = old * _scale(tl.load(exponent_at, mask=held_group, other=1))[:, :, None]
    new = old * decay - step_size * delta.reshape(BLOCK_M, BLOCK_N // 32, 32)
    # As integers, magnitudes are in the same order, and a NaN is above all.
    largest = tl.max(new.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
    finite = largest < 0x7F800000
    exponent = tl.maximum(((largest + 0x1FFFF) >> 23) - 6, 1)
    steps = new * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, :, None]
    below = tl.floor(steps)
    if STOCHASTIC:
        at = row.to(tl.int64)[:, None] * n + col[None, :]
        word = _mix((at >> 1).to(tl.uint32) ^ tl.load(keys + batch).to(tl.uint32))
        bits = (
            _turned(tl.where((at & 1) == 1, word >> 16, word), turn).to(tl.float32).reshape(BLOCK_M, BLOCK_N // 32, 32)
        )
        up = bits < (steps - below) * 65536.0
    else:
        over = steps - below
        odd = (below.to(tl.int32) & 1) == 1
        up = (over > 0.5) | ((over == 0.5) & odd)
    code = tl.where(finite[:, :, None], below + tl.where(up, 1.0, 0.0), 0.0)
    tl.store(code_at, code.to(tl.int8).reshape(BLOCK_M, BLOCK_N), mask=held)
    tl.store(exponent_at, tl.where(finite, exponent, 255).to(tl.uint8), mask=held_group)


@triton.jit
def _scale(exponent):
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
