"""Matrices with their smaller dimension first."""

from torch import Tensor

__all__ = ["wide", "like"]


def wide(M: Tensor) -> Tensor:
    """M (m, n) where m < n, its transpose else.

    One-sided methods project the smaller dimension. Seen wide, that is always the left one.
    """
    return M if M.shape[0] < M.shape[1] else M.mT


def like(M: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of this shape that M is the :func:`wide` view of."""
    m, n = shape
    return M if m < n else M.mT
