"""Stochastic rounding to 16 bits, and the bits for it.

A bf16 weight of 0.02 has a spacing of 1.2e-4: rounding to nearest loses an update of 1e-6 nearly always
(3 % of it arrives), stochastic rounding loses nothing in the mean. Its bits come from a counter:
they depend on (seed, step, matrix, row, column) alone, so every replica, every shard and every world size
gets the same.

From step to step those of an element are no new draws: they go on by the golden ratio of their range (a Weyl sequence), from
a place that is random for each element. At each step they are as uniform as draws, so nothing is lost in the mean; and over
steps they fill their range evenly, so that of T updates of d spacings each T d arrive, give or take one or two, where draws
give or take sqrt(T d (1 - d)). On a fine-tuned encoder (MiniLM, SST-2, 150 steps, r = 32, explore 32) the distance of
bf16 weights from those of fp32 is 26 % shorter for it, that of eight-bit ones 21 %.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rounding", "mix", "random_bits", "round_stochastically", "rounding_key"]


_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio; in 16 bits it would repeat itself too early


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

    @property
    def turn(self) -> int:
        """What the bits of every element have gone on by since step 0, in [0, 2^16)."""
        return (self.step * _GOLDEN & 0xFFFFFFFF) >> 16

    def weight_key(self, number: Any) -> Any:
        """The 32-bit word that keys the bits of a matrix's elements, in every step; ``number`` as in :func:`rounding_key`."""
        return rounding_key(dataclasses.replace(self, step=0), number)


def rounding_key(rounding: Rounding, number: Any) -> Any:
    """A 32-bit word of a matrix and this step, to key random numbers by.

    Args:
        number: of the matrix, an int; or of several, an int64 tensor of any shape, whose keys are one too.
    """
    return _mix_wide(_mix_wide(rounding.seed + 0x9E3779B9 * (number + 1)) + rounding.step)


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


def random_bits(first: int, count: int, key: int, device: torch.device, turn: int = 0) -> Tensor:
    """int64 (count,), uniform in [0, 2^16): the bits of elements [first, first + count) of a row-major matrix.

    Elements 2 c and 2 c + 1 take the low and the high half of a 32-bit word, hashed from c and the key, each plus ``turn``.
    """
    element = torch.arange(first, first + count, dtype=torch.int64, device=device)
    word = mix((element >> 1 & 0xFFFFFFFF) ^ key)
    return (torch.where(element & 1 == 1, word >> 16, word) + turn) & 0xFFFF


def mix(x):
    """32 bits to 32 bits, each of them depending on all: xor-shift and multiply, twice."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _mix_wide(x):
    return mix(x & 0xFFFFFFFF)
