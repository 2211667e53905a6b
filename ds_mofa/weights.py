"""Writing W <- (1 - lr wd) W - lr U diag(c) V^T into whatever part of W this rank holds.

A bf16 weight of 0.02 has a spacing of 1.2e-4: rounding to nearest loses an update of 1e-6 nearly always
(3 % of it arrives), stochastic rounding loses nothing in the mean. Its random bits come from a counter:
they depend on (seed, step, matrix, row, column) alone, so every replica, every shard and every world size
gets the same.
"""

import dataclasses
import hashlib
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from ds_mofa.options import Rounding

__all__ = ["Shard", "RoundingKey", "rounding_key", "write_update", "round_stochastically", "random_bits"]

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


class RoundingKey(NamedTuple):
    """Two 32-bit words that key the random bits of one matrix in one step."""

    first: int
    second: int


def rounding_key(seed: int, step: int, index: int) -> RoundingKey:
    """The key for matrix number ``index`` in step number ``step``."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, step, index), digest_size=8).digest()
    return RoundingKey(*struct.unpack("<II", digest))


@torch.no_grad()
def write_update(
    shard: Shard,
    U: Tensor,
    V: Tensor,
    coefficients: Tensor,
    *,
    step_size: float,
    decay: float,
    rounding: Rounding,
    key: RoundingKey,
    master: Tensor | None = None,
) -> None:
    """W <- decay W - step_size U diag(coefficients) V^T on ``shard``, in fp32 (fp64 for fp64 weights).

    Args:
        shard: the part of W to change, any floating dtype.
        U: (m, r), the whole of it.
        V: (n, r).
        coefficients: (r,), of each direction.
        step_size: lr times the factor by shape.
        decay: 1 - lr * weight_decay.
        rounding: how 16-bit weights are rounded; with a master, always to nearest.
        key: of the random bits.
        master: fp32 copy of the shard's elements, updated in the place of the weights, which follow it.
    """
    n = V.shape[0]
    exact = torch.promote_types(shard.flat.dtype, torch.float32)
    device = shard.flat.device  # the host's, where ZeRO offloads the weights
    left = U.to(device, exact) * coefficients.to(device, exact)
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
        if rounding == "stochastic" and master is None and shard.flat.dtype in (torch.bfloat16, torch.float16):
            bits = random_bits(row, last_row - row, n, key, device).view(-1)[inside]
            new = round_stochastically(new, bits, shard.flat.dtype)
        shard.flat[held] = new.to(shard.flat.dtype)


def round_stochastically(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 ``x`` to one of its two neighbours in ``dtype``, up with the probability of its distance.

    Args:
        x: fp32, finite.
        bits: int64 of the same shape, uniform in [0, 2^16).
        dtype: bfloat16 or float16.

    Returns:
        fp32 values that ``dtype`` represents exactly.
    """
    word = x.contiguous().view(torch.int32)
    if dtype == torch.bfloat16:
        return ((word + bits.int()) & -0x10000).view(torch.float32)
    normal = ((word + (bits >> 3).int()) & -0x2000).view(torch.float32)
    smallest = 2.0**-24  # below 2^-14 fp16 is a fixed-point number of this spacing
    subnormal = torch.floor(x / smallest + bits.float() / 65536) * smallest
    return torch.where(x.abs() < 2.0**-14, subnormal, normal)


def random_bits(row: int, rows: int, n: int, key: RoundingKey, device: torch.device) -> Tensor:
    """int64 (rows, n), uniform in [0, 2^16): the bits of rows [row, row + rows) of an m x n matrix.

    One 32-bit word, hashed from the counter row * ceil(n / 2) + column // 2, serves two columns: its low half
    the even one, its high half the odd one.
    """
    pairs = -(-n // 2)
    first = row * pairs
    counter = torch.arange(first, first + rows * pairs, dtype=torch.int64, device=device).view(rows, pairs)
    word = _hash(counter, key)
    return torch.stack([word & 0xFFFF, word >> 16], dim=-1).view(rows, 2 * pairs)[:, :n].contiguous()


def _hash(x: Tensor, key: RoundingKey) -> Tensor:
    """32 well-mixed bits from a counter and a key: two rounds of xor-shift and multiply, the key before each."""
    x = _mix((x ^ key.first) & 0xFFFFFFFF)
    return _mix((x + key.second) & 0xFFFFFFFF)


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
