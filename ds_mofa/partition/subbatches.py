"""The factor update in sub-batches: as many matrices at a time as a bound on the temporaries allows.

The split depends on the shapes, the rank and the bound alone. So it is the same wherever the factors lie, and so are
the results: a batched product may round otherwise when its batch is another.
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ds_mofa.partition.layout import Block

__all__ = ["Needs", "Part", "Span", "split", "temporaries"]


@dataclasses.dataclass(frozen=True)
class Span:
    """Matrices [first, last) of one parameter.

    Attributes:
        index: of the parameter.
        number: of the first of them, among the matrices of all parameters.
    """

    index: int
    first: int
    last: int
    number: int

    @property
    def count(self) -> int:
        return self.last - self.first


@dataclasses.dataclass(frozen=True)
class Part:
    """Matrices [first, last) of a block."""

    block: Block
    first: int
    last: int

    @property
    def count(self) -> int:
        """Matrices."""
        return self.last - self.first

    def spans(self) -> Iterator[Span]:
        """What of which parameters it is, in their order."""
        each = self.block.each
        for i in range(self.first // each, -(-self.last // each)):
            first, last = max(self.first - i * each, 0), min(self.last - i * each, each)
            yield Span(self.block.members[i], first, last, self.block.numbers[i] + first)

    def cut(self, values: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """:meth:`spans`, each with its part of ``values`` (count, ...)."""
        spans = list(self.spans())
        return zip(spans, values.split([span.count for span in spans]))

    def numbers(self) -> Tensor:
        """Of the matrices, among those of all parameters: (count,), int64, on the CPU."""
        firsts = torch.tensor(self.block.numbers, dtype=torch.int64, device="cpu").unsqueeze(-1)
        return (firsts + torch.arange(self.block.each, device="cpu")).flatten()[self.first : self.last]

    def views(self, flat: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """left (B, m, r), right (B, n, r) and spectrum (B, r), as :meth:`ds_mofa.partition.layout.Block.views`."""
        return tuple(view[self.first : self.last] for view in self.block.views(flat, start))


def temporaries(parts: Sequence[Part], r: int | None = None) -> int:
    """Bytes that the update of these parts needs at most, its results included.

    :func:`ds_mofa.linalg.factors.update_many` needs of every matrix its new directions and its new factors in fp32,
    8 r (m + n), and 512 r^2 for what is r x r, in float64; of one side of one part at a time the old columns, the new and the
    sketch in float64, 24 r m. Before it, :func:`ds_mofa.linalg.exploring.directions` needs 384 R^2 of every matrix, and of one
    side of one part at a time 16 R m.

    Args:
        r: columns of the factors, of the R of the parts' block; None for all.
    """
    if not parts:
        return 0
    R = parts[0].block.rank
    r = R if r is None else r
    matrices, rows = sum(p.count for p in parts), sum(p.count * sum(p.block.shape) for p in parts)
    side = max(p.count * max(p.block.shape) for p in parts)
    update = 8 * r * rows + 512 * r**2 * matrices + 24 * r * side
    return max(update, 384 * R**2 * matrices + 16 * R * side if R > r else 0)


Needs = Callable[[Sequence[Part]], int]  # bytes, and more with every matrix


def split(blocks: Sequence[Block], limit: float, needs: Needs = temporaries) -> list[list[Part]]:
    """The matrices of ``blocks`` in their order, in sub-batches that need at most ``limit`` bytes.

    A matrix that needs more by itself is a sub-batch of its own.
    """
    batches: list[list[Part]] = []
    current: list[Part] = []
    for block in blocks:
        first = 0
        while first < block.count:
            last = _most(block, first, current, limit, needs)
            if last == first and not current:
                last += 1
            if last > first:
                current.append(Part(block, first, last))
                first = last
            if first < block.count:  # it is full
                batches.append(current)
                current = []
    return [*batches, current] if current else batches


def _most(block: Block, first: int, current: list[Part], limit: float, needs: Needs) -> int:
    """The last that fits, from ``first`` on, beside ``current``."""
    fits = range(first + 1, block.count + 1)
    return first + bisect.bisect_right(fits, limit, key=lambda last: needs([*current, Part(block, first, last)]))
