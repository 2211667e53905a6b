"""Who owns which matrix, and where its numbers lie in the flat buffers.

Sketches (Y, Z) and working copies (U, V, coefficients) are flat buffers of one layout. A segment holds the matrices
of one owner, all those of one shape beside each other:

    segment of owner 0                          segment of owner 1
    [ left (B, m, r) | right (B, n, r) | spectrum (B, r) ][ next shape ... ][ padding ][ ...

so one reduce-scatter gives every owner its sketches, one all-gather gives every rank all factors, and the
update sees all matrices of one shape as one batch without a copy. What an owner keeps between steps lies likewise, in
a layout of the same blocks with other tensors in them.

A parameter is one matrix or a stack of E. A stack has one owner, and its matrices lie beside each other: what it has in a
buffer is a view (E, m, r), as its weights are (E, m, n).
"""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple, NewType

from torch import Tensor

__all__ = ["Block", "FactorSegment", "Layout", "Place", "Shapes", "SketchSegment", "exchanged"]

Shapes = tuple[tuple[int, ...], ...]
# One owner's part of a flat buffer: Y, Z and room for a spectrum; or the left, right and spectrum made of them.
SketchSegment = NewType("SketchSegment", Tensor)
FactorSegment = NewType("FactorSegment", Tensor)

_ALIGNMENT = 128  # elements; keeps every view 256-byte aligned in 16-bit buffers


def exchanged(m: int, n: int, r: int) -> Shapes:
    """Shapes of what one m x n matrix has in the buffers that are sent: left, right and spectrum."""
    return (m, r), (n, r), (r,)


class Place(NamedTuple):
    """A parameter as the layout sees it.

    Attributes:
        shape: (m, n), of each of its matrices.
        group: index of its param group.
        stack: how many they are; None where it is one, and no stack.
    """

    shape: tuple[int, int]
    group: int
    stack: int | None = None

    @property
    def each(self) -> int:
        """How many matrices it is."""
        return 1 if self.stack is None else self.stack


@dataclasses.dataclass(frozen=True)
class Block:
    """All matrices of one shape and one param group that one owner has, and that are alike in stacks or in none.

    Attributes:
        owner: rank in the group.
        shape: (m, n).
        group: index of the param group.
        rank: r, of the factors.
        members: indices of parameters.
        numbers: of the first matrix of each, among the matrices of all parameters.
        stack: matrices of each; None where it is one, and no stack.
        offset: of the block's first element in the whole flat buffer.
        tensors: shapes of what each matrix has in it.
    """

    owner: int
    shape: tuple[int, int]
    group: int
    rank: int
    members: tuple[int, ...]
    numbers: tuple[int, ...]
    stack: int | None
    offset: int
    tensors: Shapes

    @property
    def each(self) -> int:
        """Matrices of a member."""
        return 1 if self.stack is None else self.stack

    @property
    def count(self) -> int:
        """B, matrices in all."""
        return len(self.members) * self.each

    @property
    def numel(self) -> int:
        return self.count * sum(map(math.prod, self.tensors))

    def views(self, flat: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """left (B, m, r), right (B, n, r) and spectrum (B, r), or what else ``tensors`` says, of a flat buffer that begins
        at element ``start``.
        """
        B = self.count
        parts = flat.narrow(0, self.offset - start, self.numel).split([B * math.prod(one) for one in self.tensors])
        return tuple(part.view(B, *one) for part, one in zip(parts, self.tensors))


class Layout:
    """Owners and offsets; the same on every rank, from the arguments alone.

    Args:
        places: :class:`Place` of each parameter, or tuples of the same.
        rank: r, of the factors.
        world_size: number of owners.
        tensors: shapes of what each matrix has in the buffer, from m, n and r.

    Attributes:
        blocks: every block, owner by owner.
        owners: of each parameter.
        matrices: of all parameters.
        segment: elements of one owner's part, the same for all.
        numel: elements of a whole flat buffer, segment x world size.
    """

    def __init__(
        self,
        places: Sequence[tuple],
        rank: int,
        world_size: int,
        tensors: Callable[[int, int, int], Shapes] = exchanged,
    ):
        every = [Place(*place) for place in places]
        self.owners = _balance(every, world_size)
        *numbers, self.matrices = itertools.accumulate((place.each for place in every), initial=0)
        by_owner: list[dict[Place, list[int]]] = [defaultdict(list) for _ in range(world_size)]
        for index, (place, owner) in enumerate(zip(every, self.owners)):
            by_owner[owner][place].append(index)

        local, ends = [], []
        for owner, by_place in enumerate(by_owner):
            end = 0
            for (shape, group, stack), members in by_place.items():
                first = tuple(numbers[index] for index in members)
                own = tensors(*shape, rank)
                local.append(Block(owner, shape, group, rank, tuple(members), first, stack, end, own))
                end = _aligned(end + local[-1].numel)
            ends.append(end)
        self.segment = max(ends)
        self.numel = self.segment * world_size
        self.blocks = [dataclasses.replace(b, offset=b.offset + b.owner * self.segment) for b in local]
        self._place = {index: (block, i) for block in self.blocks for i, index in enumerate(block.members)}

    def owned_by(self, owner: int) -> list[Block]:
        return [block for block in self.blocks if block.owner == owner]

    def views(self, flat: Tensor, index: int, start: int = 0) -> tuple[Tensor, ...]:
        """left (m, r), right (n, r) and spectrum (r,), or what else ``tensors`` says, of one parameter in a flat buffer that
        begins at element ``start``; of a stack (E, m, r), (E, n, r) and (E, r).
        """
        block, i = self._place[index]
        if block.stack is None:
            return tuple(view[i] for view in block.views(flat, start))
        return tuple(view[i * block.stack : (i + 1) * block.stack] for view in block.views(flat, start))


def _balance(places: Sequence[Place], world_size: int) -> list[int]:
    """Longest first, each to the owner with the least: segments, and so the work, come out nearly equal."""
    owners, load = [0] * len(places), [0] * world_size
    sizes = [place.each * sum(place.shape) for place in places]
    for index in sorted(range(len(places)), key=lambda i: (-sizes[i], places[i].shape, i)):
        owner = load.index(min(load))
        owners[index] = owner
        load[owner] += sizes[index]
    return owners


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
