"""Columns of random signs beside the factors in the working copies, the same on every rank without a message.

A sign depends on the seed, the step, and its place among those of all matrices in their order: not on who owns what.
They are overwritten when the factors are gathered; 2 bits a sign are kept from one backward to the write, its
counter's share and its own.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_mofa.kernels.random_bits import Rounding, rounding_key
from ds_mofa.linalg.exploring import sign_words, signs
from ds_mofa.partition.layout import Block, Layout
from ds_mofa.partition.subbatches import Part, split
from ds_mofa.rules.batch import PlaceSigns

__all__ = ["SignColumns"]

_SIGNS = 32  # in a word


class SignColumns:
    """The last k columns of left and right: F (m x k), signs / sqrt(m), and E (n x k), signs / sqrt(n).

    Args:
        layout: of the buffers that are sent, of r + k columns.
        r: columns before the signs.
        seed: of the run.
        limit: bytes of temporaries, as ``update_bytes``.
        device: of the buffers.
    """

    def __init__(self, layout: Layout, r: int, seed: int, limit: float, device: torch.device):
        self._r, self._seed = r, seed
        self._passes = split(layout.blocks, limit, functools.partial(_temporaries, r=r))
        self._words: dict[Part, Tensor] = {}
        self._parts: dict[Block, list[Part]] = {block: [] for block in layout.blocks}
        first = _first_words(layout, r)
        counters = [[_counters(part, first, r) for part in parts] for parts in self._passes]
        self._counters = [torch.cat(some).to(device) for some in counters]
        self._drawn = [torch.zeros_like(whole) for whole in self._counters]
        for parts, some, whole in zip(self._passes, counters, self._drawn):
            for part, own in zip(parts, whole.split([len(one) for one in some])):
                self._words[part] = own
                self._parts[part.block].append(part)

    def parts(self, block: Block) -> list[Part]:
        """The matrices of ``block``, so many at a time as are written together within ``limit``."""
        return self._parts[block]

    def held(self) -> list[Tensor]:
        """The bits and their counters."""
        return [*self._counters, *self._drawn]

    def draw(self, working: Tensor, steps: int) -> None:
        """New E and F into columns r, ... of the working copies."""
        key = rounding_key(Rounding(False, self._seed, steps), -1)  # no matrix's own
        for parts, counters, words in zip(self._passes, self._counters, self._drawn):
            words.copy_(sign_words(counters, key))
            for part, own in zip(parts, signs(words).split([_SIGNS * len(self._words[part]) for part in parts])):
                left, right, _ = part.views(working)
                _place(own, left[..., self._r :], right[..., self._r :])

    def of(self, part: Part) -> PlaceSigns:
        """Writes the signs of a part that were drawn last."""
        return lambda F, E: _place(signs(self._words[part]), F, E)


def _place(drawn: Tensor, F: Tensor, E: Tensor) -> None:
    """F (B, m, k) and E (B, n, k) from all signs of a part."""
    at = 0
    for target in (F, E):
        B, rows, k = target.shape
        each = _SIGNS * _words(rows, k)
        own = drawn[at : at + B * each].view(B, each)[:, : rows * k].unflatten(-1, (rows, k))
        # A number would be taken in fp32, also beside a target of fp64.
        wide = torch.promote_types(target.dtype, torch.float32)
        length = torch.tensor(1 / math.sqrt(rows), dtype=wide, device="cpu")
        torch.mul(own, length, out=target)
        at += B * each


def _temporaries(parts: Sequence[Part], r: int) -> int:
    """Bytes that drawing the signs of all these parts needs at most, 2 k (m + n) of a matrix, and writing one of them,
    4 (r + 2 k) (m + n) in fp32 and its signs.
    """
    if not parts:
        return 0
    k = parts[0].block.rank - r
    rows = [part.count * sum(part.block.shape) for part in parts]
    return max(2 * k * sum(rows), (4 * (r + 2 * k) + 2 * k) * max(rows))


def _words(rows: int, k: int) -> int:
    return -(-rows * k // _SIGNS)


def _first_words(layout: Layout, r: int) -> Tensor:
    """The number of each matrix's first word, (matrices,), int64."""
    each = torch.zeros(layout.matrices, dtype=torch.int64, device="cpu")
    for block in layout.blocks:
        for number in block.numbers:
            each[number : number + block.each] = sum(_words(rows, block.rank - r) for rows in block.shape)
    return each.cumsum(0) - each


def _counters(part: Part, first: Tensor, r: int) -> Tensor:
    """The numbers of the words of a part: of all its F, then of all its E; int32."""
    k, found = part.block.rank - r, []
    starts = first[part.numbers()]
    for rows in part.block.shape:
        count = _words(rows, k)
        found.append((starts.unsqueeze(-1) + torch.arange(count, device="cpu")).flatten())
        starts = starts + count
    return torch.cat(found).to(torch.int32)
