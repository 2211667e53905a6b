"""The part of a parameter that a process holds, and what of which of its matrices that is."""

import dataclasses
from collections.abc import Iterator

from torch import Tensor

__all__ = ["Run", "Shard", "runs"]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Elements [start, start + length) of each of ``count`` row-major m x n matrices, on this process.

    Attributes:
        flat: 1-D, contiguous, the weights themselves (a view), or the codes of those that lie in eight bits; may be empty.
        start: index of the first element.
        count: of the matrices, one after the other in ``flat``; all of each, where there are several.
        exponents: of the codes, 1-D, contiguous (:mod:`ds_mofa.kernels.int8`); None where ``flat`` is the weights.
    """

    flat: Tensor
    start: int = 0
    count: int = 1
    exponents: Tensor | None = None

    @property
    def length(self) -> int:
        """Elements of each matrix."""
        return self.flat.numel() // self.count

    def each(self) -> "list[Shard]":
        """One for each of the matrices."""
        if self.count == 1:
            return [self]
        codes = self.flat.split(self.length)
        if self.exponents is None:
            return [Shard(one, self.start) for one in codes]
        exponents = self.exponents.split(self.exponents.numel() // self.count)
        return [Shard(one, self.start, 1, its) for one, its in zip(codes, exponents)]


@dataclasses.dataclass(frozen=True)
class Run:
    """Matrices of a stack that are alike in what a process holds of them.

    Attributes:
        first: of them.
        count: how many.
        low: index of their first element in the process's part of the stack.
        start: index of that in its matrix.
        length: elements of each.
    """

    first: int
    count: int
    low: int
    start: int
    length: int

    def cut(self, flat: Tensor) -> Tensor:
        """Their elements, of the process's part of the stack, (count * length,)."""
        return flat.narrow(0, self.low, self.count * self.length)

    def of(self, shard: Shard) -> Shard:
        """Them, of the process's part of the stack."""
        exponents = shard.exponents
        if exponents is not None:
            group = shard.flat.numel() // exponents.numel()
            exponents = exponents.narrow(0, self.low // group, self.count * self.length // group)
        return Shard(self.cut(shard.flat), self.start, self.count, exponents)


def runs(start: int, numel: int, size: int, first: int, last: int) -> Iterator[Run]:
    """What a process holds of matrices [first, last) of a stack: at most the end of one, whole ones, and the beginning of
    one more.

    Args:
        start, numel: its elements of the stack are [start, start + numel).
        size: m n, of each matrix.
    """
    at, stop = max(start, first * size), min(start + numel, last * size)
    while at < stop:
        number, inside = divmod(at, size)
        length = min(size - inside, stop - at)
        count = (stop - at) // size if length == size else 1
        yield Run(number, count, at - start, inside, length)
        at += count * length
