"""What exploring adds to a rule's update: directions beside the momentum's (:mod:`ds_mofa.linalg.exploring`), and signs.

The last k columns of what is sent are its own. In backward the working copies are left = [U F] and right = [V E], with
F and E of random signs; published are left = [U' A] and right = [V' B]; written is [U' A F] diag(c, s, s) [V' E B]^T.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_mofa.linalg.exploring import Look, directions
from ds_mofa.rules.batch import MatrixBatch, PlaceSigns

__all__ = ["explore", "seen_rows", "stay", "with_signs"]


def explore(
    batches: Sequence[MatrixBatch],
    r: int,
    length: Callable[[int, int], float],
    grams: Sequence[Sequence[tuple[Tensor, Tensor] | None]] | None = None,
) -> None:
    """Overwrite the last k columns of Y, Z and spectrum with A, B and s.

    Args:
        batches: whose state begins with U and V.
        r: of the factors.
        length: s, of the directions of an m x n matrix.
        grams: of each batch :func:`ds_mofa.linalg.exploring.look_grams` of its two sides, where they are at hand.
    """
    looks = []
    for batch, (left, right) in zip(batches, grams or [(None, None)] * len(batches), strict=True):
        U, V, *_ = batch.state
        looks += [Look(U, batch.Y, batch.right, left), Look(V, batch.Z, batch.left, right)]
    sketches = itertools.chain.from_iterable((batch.Y, batch.Z) for batch in batches)
    for sketch, found in zip(sketches, directions(looks), strict=True):
        sketch[..., r:] = found
    for batch in batches:
        batch.spectrum[..., r:] = length(*batch.shape)


def stay(batch: MatrixBatch, r: int) -> None:
    """No direction: in the first step there is no momentum to look beside."""
    for sketch in (batch.Y, batch.Z, batch.spectrum):
        sketch[..., r:] = 0


def with_signs(
    left: Tensor, right: Tensor, coefficients: Tensor, r: int, signs: PlaceSigns
) -> tuple[Tensor, Tensor, Tensor]:
    """[U' A F] (B, m, r + 2 k), [V' E B] (B, n, r + 2 k) and [c s s] (B, r + 2 k).

    F and E are zero in the rows in which [U' A] and [V' B] are: those of tokens that have not come. Neither the sketches
    nor the momentum would see a difference.
    """
    R = left.shape[-1]
    k = R - r
    near, far = (view.new_empty(*view.shape[:-1], R + k) for view in (left, right))
    near[..., :R] = left
    far[..., :r] = right[..., :r]
    far[..., R:] = right[..., r:]
    F, E = near[..., R:], far[..., r:R]
    signs(F, E)
    F.mul_(seen_rows(left))
    E.mul_(seen_rows(right))
    return near, far, torch.cat([coefficients, coefficients[..., r:]], dim=-1)


def seen_rows(view: Tensor) -> Tensor:
    """(B, rows, 1) bool of what is published of one side: a row that has never had a gradient is zero in all columns."""
    return view.any(-1, keepdim=True)
