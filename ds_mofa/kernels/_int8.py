"""Weights of eight bits on a GPU: widened for a product, and written by an update in one pass over them.

The twins are :func:`ds_mofa.kernels.int8.widened` and ``ds_mofa.weights.int8.write_one``; the random bits are those of
:func:`ds_mofa.kernels.random_bits.random_bits`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_mofa.kernels import on_its_device, tile_that_fits
from ds_mofa.kernels._write import _any, _mix, _product, _turned, addresses, check_count, keys_of
from ds_mofa.kernels.random_bits import Rounding
from ds_mofa.kernels.shard import Shard

_WIDENED = 8192  # weights by one program
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@on_its_device
def widen(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`ds_mofa.kernels.int8.widened`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    count = codes.numel()
    if count:
        grid = (triton.cdiv(count, _WIDENED),)
        _widen_kernel[grid](codes, exponents, out, count, DTYPE=_DTYPES[dtype], BLOCK=_WIDENED, num_warps=8)
    return out


@on_its_device
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
    block_m, block_w = tile_that_fits(device, (64, 32), lambda rows, words: (rows + 4 * words) * row)
    grid = (triton.cdiv(n // 4, block_w), triton.cdiv(rows, block_m), B)
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
        BLOCK_W=block_w,
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
    BLOCK_W: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Rows [first_row, first_row + rows) of each matrix, four neighbours as one word: arithmetic is what takes the time, and so
    the fourth part of all that is the same for them. Eight words are a group.
    """
    batch = tl.program_id(2).to(tl.int64)
    words, groups = n // 4, n // 32
    word = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    group = tl.program_id(0) * (BLOCK_W // 8) + tl.arange(0, BLOCK_W // 8)
    k = tl.arange(0, R)
    in_v = (k < r)[:, None] & (word < words)[None, :]
    columns = V + batch * n * r + word[None, :] * (4 * r) + k[:, None]
    v0 = tl.load(columns, mask=in_v, other=0.0)
    v1 = tl.load(columns + r, mask=in_v, other=0.0)
    v2 = tl.load(columns + 2 * r, mask=in_v, other=0.0)
    v3 = tl.load(columns + 3 * r, mask=in_v, other=0.0)
    c = tl.load(coefficients + batch * r + k, mask=k < r, other=0.0).to(tl.float32)
    moving = _any(c)
    key = tl.load(keys + batch).to(tl.uint32)
    code_words = tl.load(codes + batch).to(tl.pointer_type(tl.int32))
    group_bytes = tl.load(exponents + batch).to(tl.pointer_type(tl.uint8))

    own = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first_row + own
    own_held = tl.where(moving, own < rows, False)[:, None]
    held = own_held & (word < words)[None, :]
    own = own.to(tl.int64)[:, None]
    at = own * words + word[None, :]
    old = tl.load(code_words + at, mask=held, other=0)
    # A power of two: decay may go into it, and nothing is rounded once more.
    scale = _scale(tl.load(group_bytes + own * groups + (word // 8)[None, :], mask=held, other=1)) * decay
    in_u = (row < m)[:, None] & (k < r)[None, :]
    u = tl.load(U + batch * m * r + row[:, None] * r + k[None, :], mask=in_u, other=0.0)
    u = (u.to(tl.float32) * c[None, :]).to(u.dtype)
    new0 = ((old << 24) >> 24).to(tl.float32) * scale - step_size * _product(u, v0)
    new1 = ((old << 16) >> 24).to(tl.float32) * scale - step_size * _product(u, v1)
    new2 = ((old << 8) >> 24).to(tl.float32) * scale - step_size * _product(u, v2)
    new3 = (old >> 24).to(tl.float32) * scale - step_size * _product(u, v3)

    most = tl.maximum(tl.maximum(_size(new0), _size(new1)), tl.maximum(_size(new2), _size(new3)))
    largest = tl.max(most.reshape(BLOCK_M, BLOCK_W // 8, 8), axis=2)
    finite = largest < 0x7F800000
    exponent = tl.maximum(((largest + 0x1FFFF) >> 23) - 6, 1)
    inverse = tl.where(finite, (254 - exponent) << 23, 0).to(tl.float32, bitcast=True)[:, :, None]
    inverse = inverse.broadcast_to(BLOCK_M, BLOCK_W // 8, 8).reshape(BLOCK_M, BLOCK_W)
    # n is even: two words of bits, each of two neighbours. Of their numbers 32 bits count.
    pair = row.to(tl.uint32)[:, None] * (n // 2).to(tl.uint32) + (word * 2).to(tl.uint32)[None, :]
    low, high = pair, pair
    if STOCHASTIC:
        low, high = _mix(pair ^ key), _mix((pair + 1) ^ key)
    code = _code(new0 * inverse, low, turn, STOCHASTIC) & 0xFF
    code |= (_code(new1 * inverse, low >> 16, turn, STOCHASTIC) & 0xFF) << 8
    code |= (_code(new2 * inverse, high, turn, STOCHASTIC) & 0xFF) << 16
    code |= _code(new3 * inverse, high >> 16, turn, STOCHASTIC) << 24
    tl.store(code_words + at, tl.where(inverse == 0.0, 0, code), mask=held)
    exponent = tl.where(finite, exponent, 255).to(tl.uint8)
    tl.store(group_bytes + own * groups + group[None, :], exponent, mask=own_held & (group < groups)[None, :])


@triton.jit
def _size(x):
    """Magnitudes as integers, which are in the same order; a NaN is above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _code(steps, bits, turn, STOCHASTIC: tl.constexpr):
    """Up where 16 bits, a share of one, are below what is over a whole step; or to the nearest, to even."""
    below = tl.floor(steps)
    over = steps - below
    if STOCHASTIC:
        up = _turned(bits, turn).to(tl.float32) < over * 65536.0
    else:
        up = (over > 0.5) | ((over == 0.5) & ((below.to(tl.int32) & 1) == 1))
    return below.to(tl.int32) + up.to(tl.int32)


@triton.jit
def _scale(exponent):
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
