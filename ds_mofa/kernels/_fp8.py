"""Rounding to e4m3 on a GPU, in one pass over what is rounded. The twins are in :mod:`ds_mofa.kernels.fp8`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_mofa.kernels import on_its_device
from ds_mofa.kernels.fp8 import FP8

_TILE = (128, 64)  # rows and columns of W: 128 bytes are one after the other in each row that is written


@on_its_device
def rows(values: Tensor, channels: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`ds_mofa.kernels.fp8.rows`; ``values`` contiguous."""
    t, k = values.shape
    out = torch.empty(t, k, dtype=FP8, device=values.device)
    scales = torch.empty(t, dtype=torch.float32, device=values.device)
    if t:
        block = triton.next_power_of_2(k)
        warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
        given = channels is not None
        _rows_kernel[(t,)](
            values, channels if given else scales, out, scales, k, CHANNELS=given, BLOCK=block, num_warps=warps
        )
    return out, scales


@on_its_device
def columns(weight: Tensor, scales: Tensor) -> Tensor:
    """See :func:`ds_mofa.kernels.fp8.columns`; ``weight`` contiguous."""
    m, n = weight.shape
    out = torch.empty(n, m, dtype=FP8, device=weight.device)
    block_m, block_n = _TILE
    grid = (triton.cdiv(n, block_n), triton.cdiv(m, block_m))
    _columns_kernel[grid](weight, scales, out, m, n, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8)
    return out


@triton.jit
def _rows_kernel(values, channels, out, scales, k, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    held = at < k
    x = tl.load(values + row * k + at, mask=held, other=0.0).to(tl.float32)
    if CHANNELS:
        x = x * tl.load(channels + at, mask=held, other=0.0)
    # As integers, magnitudes are in the same order, and a NaN is above all.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - 135, -100)
    # A scale that is no number makes one of the whole row.
    scale = tl.where(largest < 0x7F800000, ((exponent + 127) << 23).to(tl.float32, bitcast=True), float("nan"))
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(out + row * k + at, (x * inverse).to(tl.float8e4nv), mask=held)
    tl.store(scales + row, scale)


@triton.jit
def _columns_kernel(weight, scales, out, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = (i < m)[:, None] & (j < n)[None, :]
    w = tl.load(weight + i.to(tl.int64)[:, None] * n + j[None, :], mask=held, other=0.0).to(tl.float32)
    scale = tl.load(scales + i, mask=i < m, other=1.0)
    # Of a power of two: exact, which a GPU's division is not.
    inverse = ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    inverse = tl.where(scale == scale, inverse, scale)
    turned = tl.trans((w * inverse[:, None]).to(tl.float8e4nv))
    tl.store(out + j.to(tl.int64)[:, None] * m + i[None, :], turned, mask=tl.trans(held))
