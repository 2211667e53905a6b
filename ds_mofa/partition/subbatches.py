"""The factor update in sub-batches: as many matrices at a time as a bound on the temporaries allows.

The split depends on the shapes, the rank and the bound alone. So it is the same wherever the factors lie, and so are
the results: a batched product may round otherwise when its batch is another.
"""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ds_mofa.partition.layout import Block

__all__ = ["Part", "split", "temporaries"]


@dataclasses.dataclass(frozen=True)
class Part:
    """Matrices [first, last) of a block."""

    block: Block
    first: int
    last: int

    @property
    def members(self) -> tuple[int, ...]:
        """Indices of the matrices."""
        return self.block.members[self.first : self.last]

    def views(self, flat: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """left (B, m, r), right (B, n, r) and spectrum (B, r), as :meth:`ds_mofa.partition.layout.Block.views`."""
        return tuple(view[self.first : self.last] for view in self.block.views(flat, start))


def temporaries(parts: Sequence[Part]) -> int:
    """Bytes that :func:`ds_mofa.linalg.factors.update_many` needs at most for these parts, its results included.

    Of every matrix its new directions and its new factors in fp32, 8 r (m + n), and 512 r^2 for what is r x r, in
    float64; of one side of one part at a time the old columns, the new and the sketch in float64, 24 r m.
    """
    every = sum((p.last - p.first) * (8 * p.block.rank * sum(p.block.shape) + 512 * p.block.rank**2) for p in parts)
    return every + max((24 * (p.last - p.first) * p.block.rank * max(p.block.shape) for p in parts), default=0)


def split(blocks: Sequence[Block], limit: float) -> list[list[Part]]:
    """The matrices of ``blocks`` in their order, in sub-batches of at most ``limit`` bytes of temporaries.

    A matrix that needs more by itself is a sub-batch of its own.
    """
    batches: list[list[Part]] = []
    current: list[Part] = []
    for block in blocks:
        first = 0
        while first < len(block.members):
            last = first
            while last < len(block.members) and temporaries([*current, Part(block, first, last + 1)]) <= limit:
                last += 1
            if last == first and not current:
                last += 1
            if last > first:
                current.append(Part(block, first, last))
                first = last
            if first < len(block.members):  # it is full
                batches.append(current)
                current = []
    return [*batches, current] if current else batches
