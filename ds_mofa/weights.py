"""Writing W <- (1 - lr wd) W - lr U diag(c) V^T into whatever part of W this rank holds.

A bf16 weight of 0.02 has a spacing of 1.2e-4: rounding to nearest loses an update of 1e-6 nearly always
(3 % of it arrives), stochastic rounding loses nothing in the mean. Its random bits come from a counter:
they depend on (seed, step, matrix, row, column) alone, so every replica, every shard and every world size
gets the same.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_mofa.kernels import triton_serves

__all__ = ["Shard", "Rounding", "write_updates", "rounding_key", "round_stochastically", "random_bits", "mix"]

_CHUNK = 1 << 22  # elements of W per pass; bounds the fp32 temporaries to some tens of MB


@dataclasses.dataclass(frozen=True)
class Shard:
    """Elements [start, start + flat.numel()) of a row-major m x n matrix, on this rank.

    Attributes:
        flat: 1-D, contiguous, the weights themselves (a view); may be empty.
        start: index of its first element.
    """

    flat: Tensor
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How 16-bit weights are rounded.

    Attributes:
        stochastic: or to nearest.
        seed: of the run, below 2^31.
        step: number of the optimizer step.
    """

    stochastic: bool
    seed: int = 0
    step: int = 0


@torch.no_grad()
def write_updates(
    shards: Sequence[Shard],
    U: Tensor,
    V: Tensor,
    coefficients: Tensor,
    *,
    indices: Sequence[int],
    step_size: float,
    decay: float,
    rounding: Rounding,
    masters: Sequence[Tensor] | None = None,
) -> None:
    """W <- decay W - step_size U diag(coefficients) V^T for B matrices of one shape, in fp32 (fp64 for fp64).

    A matrix whose coefficients are all zero has had no gradient and stays as it is, bit for bit, its master too: it is
    not decayed and not rounded.

    Args:
        shards: the parts of each W to change; all of the same range and dtype.
        U: (B, m, r).
        V: (B, n, r).
        coefficients: (B, r), of each direction; all zero where nothing is to be done.
        indices: of the matrices in the model; they key the random bits.
        step_size: lr times the factor by shape.
        decay: 1 - lr * weight_decay.
        rounding: of 16-bit weights; with masters, always to nearest.
        masters: fp32 copies of the shards' elements, updated in the place of the weights, which follow them.
    """
    if masters is not None:
        rounding = dataclasses.replace(rounding, stochastic=False)
    if triton_serves(shards[0].flat):
        from ds_mofa.kernels import _write

        _write.launch(shards, U, V, coefficients, indices, step_size, decay, rounding, masters)
        return
    moving = coefficients.any(-1).tolist()  # a NaN is not zero
    for i, shard in enumerate(shards):
        if not moving[i]:
            continue
        key = rounding_key(rounding, indices[i])
        master = None if masters is None else masters[i]
        _write_one(shard, U[i], V[i], coefficients[i], step_size, decay, key if rounding.stochastic else None, master)


def _write_one(
    shard: Shard,
    U: Tensor,
    V: Tensor,
    coefficients: Tensor,
    step_size: float,
    decay: float,
    key: int | None,
    master: Tensor | None,
) -> None:
    n = V.shape[0]
    exact = torch.promote_types(shard.flat.dtype, torch.float32)
    device = shard.flat.device  # the host's, where ZeRO offloads the weights
    # In the working copies' own precision, which the GPU's matrix units take.
    left = (U.to(device, exact) * coefficients.to(device, exact)).to(U.dtype).to(exact)
    right = V.to(device, exact).mT
    source = shard.flat if master is None else master
    stop = shard.start + shard.flat.numel()
    rows_per_chunk = max(1, _CHUNK // n)
    for row in range(shard.start // n, -(-stop // n), rows_per_chunk):
        last_row = min(row + rows_per_chunk, -(-stop // n))
        low, high = max(row * n, shard.start), min(last_row * n, stop)
        inside = slice(low - row * n, high - row * n)  # of the chunk's rows
        held = slice(low - shard.start, high - shard.start)  # of the shard
        delta = (left[row:last_row] @ right).view(-1)[inside]
        new = torch.sub(source[held].to(exact) * decay, delta, alpha=step_size)
        if master is not None:
            master[held] = new
        if key is not None and shard.flat.dtype in (torch.bfloat16, torch.float16):
            bits = random_bits(low, high - low, key, device)
            new = round_stochastically(new, bits, shard.flat.dtype)
        shard.flat[held] = new.to(shard.flat.dtype)


def rounding_key(rounding: Rounding, index: int) -> int:
    """The 32-bit word that keys the random bits of matrix number ``index`` in this step."""
    return _mix_int(_mix_int(rounding.seed + 0x9E3779B9 * (index + 1)) + rounding.step)


def round_stochastically(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 ``x`` to one of its two neighbours in ``dtype``, up with the probability of its distance.

    Args:
        x: fp32. A NaN stays one, and so does an infinity.
        bits: int64 of the same shape, uniform in [0, 2^16).
        dtype: bfloat16 or float16.

    Returns:
        fp32 values that ``dtype`` represents exactly.
    """
    # A NaN of all bits but the sign, a GPU's own, would become -0 under random bits.
    word = torch.where(x.isnan(), math.nan, x).contiguous().view(torch.int32)
    if dtype == torch.bfloat16:
        return ((word + bits.int()) & -0x10000).view(torch.float32)
    normal = ((word + (bits >> 3).int()) & -0x2000).view(torch.float32)
    smallest = 2.0**-24  # below 2^-14 fp16 is a fixed-point number of this spacing
    steps = x / smallest
    below = steps.floor()  # apart from the bits: their sum would be rounded itself
    subnormal = (below + (bits < (steps - below) * 65536)) * smallest
    return torch.where(x.abs() < 2.0**-14, subnormal, normal)


def random_bits(first: int, count: int, key: int, device: torch.device) -> Tensor:
    """int64 (count,), uniform in [0, 2^16): the bits of elements [first, first + count) of a row-major matrix.

    Elements 2 c and 2 c + 1 take the low and the high half of a 32-bit word, hashed from c and the key.
    """
    element = torch.arange(first, first + count, dtype=torch.int64, device=device)
    word = mix((element >> 1 & 0xFFFFFFFF) ^ key)
    return torch.where(element & 1 == 1, word >> 16, word & 0xFFFF)


def mix(x):
    """32 bits to 32 bits, each of them depending on all: xor-shift and multiply, twice."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _mix_int(x: int) -> int:
    return mix(x & 0xFFFFFFFF)
