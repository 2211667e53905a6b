"""The part of a matrix that a process holds."""

import dataclasses

from torch import Tensor

__all__ = ["Shard"]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Elements [start, start + flat.numel()) of a row-major m x n matrix, on this rank.

    Attributes:
        flat: 1-D, contiguous, the weights themselves (a view); may be empty.
        start: index of its first element.
    """

    flat: Tensor
    start: int = 0
