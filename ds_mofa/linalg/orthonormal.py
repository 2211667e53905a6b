"""Orthonormal bases of batches of tall matrices, from their Gram matrices.

The columns are long (m of thousands) and few (r of tens). All that is decided is decided on Gram matrices in
float64, r x r, for every side of every layer at once; the long columns are only multiplied. float64 carries the
squares of float32 numbers, which is what Cholesky-QR needs; data that is itself float64 goes through Householder's QR.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_mofa.linalg.batching import together

__all__ = [
    "Side",
    "Basis",
    "complements",
    "sketch_gram",
    "joined",
    "in_span",
    "polished",
    "orthonormalizer",
    "generic_columns",
    "live_rows",
]


class Side(NamedTuple):
    """Columns X (B, m, k) to orthonormalise, and to U (B, m, c), whose columns are orthonormal already (c may be 0).

    ``gram`` is :func:`sketch_gram` of the two where it is at hand.
    """

    U: Tensor
    X: Tensor
    gram: Tensor | None = None


def sketch_gram(*parts: Tensor) -> Tensor:
    """[U Y]^T [U Y], (B, c + k, c + k), float64; U (B, m, c), Y (B, m, k), or any number of such parts."""
    S = joined(*parts)
    return S.mT @ S


class Basis(NamedTuple):
    """[U Q] of one side, orthonormal to rounding, as [U rough] combination: Q is never written out.

    Attributes:
        U: (B, m, c).
        rough: (B, m, k), nearly orthonormal and nearly Q.
        combination: (B, c + k, c + k), float64. Its left part takes what rounding has added out of U.
        R: (B, k, columns of X), Q^T X.
    """

    U: Tensor
    rough: Tensor
    combination: Tensor
    R: Tensor

    def turned(self, P: Tensor) -> Tensor:
        """[U Q] P, (B, m, r), in U's dtype; P (B, c + k, r)."""
        return (joined(self.U, self.rough) @ (self.combination @ P.double())).to(self.rough.dtype)


def complements(sides: Sequence[Side]) -> list[Basis]:
    """The basis [U Q] of each side, Q (B, m, min(k, m - c)): it spans X, as far as it has columns.

    A direction of X that depends on those before it is replaced by an arbitrary one: before the factorization,
    since in its result the later directions would have lost a part to it.
    """
    if sides[0].X.dtype == torch.float64:
        return [_by_householder(U, X) for U, X, _ in sides]
    starts = [_with_room(side) for side in sides]
    grams = [sketch_gram(start.U, start.X) if start.gram is None else start.gram for start in starts]
    kept = [U.shape[-1] for U, _, _ in sides]
    firsts = together(grams, _first_combination, kept)
    # What is long and in float64 lives within one call for one side: ds_mofa.partition.subbatches counts on it.
    roughly = [_rough(U, X, *first) for (U, X, _), first in zip(starts, firsts)]
    # Where X had a direction of relative size s, Q is orthonormal to 1e-16 / s^2, and a filled one is not at all.
    grams = [_gram_beside(U, Q, X) for (U, X, _), Q in zip(sides, roughly)]
    ends = together(grams, _last_combination, kept)
    return [Basis(U, Q, *end) for (U, _, _), Q, end in zip(sides, roughly, ends)]


def joined(*parts: Tensor) -> Tensor:
    """Their columns beside each other, (B, m, sum of k), in float64."""
    width = sum(part.shape[-1] for part in parts)
    S = torch.empty(*parts[0].shape[:-1], width, dtype=torch.float64, device=parts[0].device)
    return torch.cat(parts, dim=-1, out=S)


def in_span(near: Tensor, across: Tensor, *, steps: int = 1) -> Tensor:
    """(U^T U)^-1 U^T X (B, c, k), from U^T U and U^T X, of U orthonormal to rounding, to that to the power of ``steps`` + 1."""
    inside = across
    for _ in range(steps):
        inside = torch.baddbmm(inside + across, near, inside, alpha=-1)
    return inside


def polished(Q: Tensor) -> Tensor:
    """Q, orthonormal to the rounding of its dtype, in float64 and orthonormal to the square of that (Newton-Schulz)."""
    Q = Q.double()
    return 1.5 * Q - 0.5 * Q @ (Q.mT @ Q)


def orthonormalizer(H: Tensor) -> Tensor:
    """L^-T (B, k, k) of H = L L^T: X L^-T is orthonormal where X^T X = H."""
    k = H.shape[-1]
    eye = torch.eye(k, dtype=H.dtype, device=H.device)
    L = torch.linalg.cholesky_ex(H + 4 * k * torch.finfo(H.dtype).eps * eye).L
    # Multiplied by the small inverse: a GPU solves for m right-hand sides more slowly than it multiplies.
    return torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False).mT


def generic_columns(like: Tensor, k: int) -> Tensor:
    """(B, m, k) fixed generic columns of norm about 1: the same on every rank and in every run."""
    return _generic_columns(like.shape[-2], k, like.dtype, like.device).expand(*like.shape[:-2], -1, -1)


def live_rows(S: Tensor, least: int) -> Tensor:
    """(B, m, 1), 0 for the rows of S (B, m, k) that are exactly zero, 1 for the others, in S's dtype.

    Of a gradient's sketch they are those of an embedding's tokens that have not come. Columns that fill a basis up stay out
    of them, so that such a row never moves. All is 1 where fewer than ``least`` rows are left, too few for so many columns.
    """
    # A row's product with a generic column is zero where the row is, at a tenth of what any() takes on a CPU.
    return _live(S @ _generic_columns(S.shape[-1], 1, S.dtype, S.device), least).to(S.dtype)


def _live(image: Tensor, least: int) -> Tensor:
    """:func:`live_rows`, bool, from the product (B, m, 1) with a generic column."""
    live = image != 0
    return live | (live.sum(-2, keepdim=True) < least)


def _rough(U: Tensor, X: Tensor, combination: Tensor, dependent: Tensor) -> Tensor:
    """[U X] combination, with generic columns where X's are dependent; the last column tells which rows are live."""
    k = dependent.shape[-1]
    Q = joined(U, X) @ combination
    fill = dependent.unsqueeze(-2) & _live(Q[..., k:], combination.shape[-2])
    return torch.where(fill, generic_columns(X, k), Q[..., :k].to(X.dtype))


def _gram_beside(U: Tensor, Q: Tensor, X: Tensor) -> Tensor:
    """[U Q]^T [U Q X], float64."""
    S = joined(U, Q, X)
    return S[..., : U.shape[-1] + Q.shape[-1]].mT @ S


def _first_combination(gram: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """C (B, c + k, k + 1) that makes [U X] C nearly orthonormal in its first k columns, and generic in the last; and which of
    the k (B, k) are to be replaced, zero in C.
    """
    both = gram.shape[-1]
    lean, H = _without_span(gram, c)
    k = H.shape[-1]
    mixed = _generic_columns(both, 1, gram.dtype, gram.device).expand(len(gram), -1, -1)
    if k == 0:
        return mixed, gram.new_zeros(gram.shape[0], 0, dtype=torch.bool)
    eps = torch.finfo(H.dtype).eps
    whole = gram.diagonal(dim1=-2, dim2=-1)[..., c:].sum(-1)
    size = H.diagonal(dim1=-2, dim2=-1).sum(-1)
    size = torch.where(size > 0, size, 1)[..., None, None]
    H = H / size
    # What rounding leaves of a direction that lies in span U is no direction.
    noise = 16 * (k + 8) * eps * (1 + whole[..., None, None] / size)
    eye = torch.eye(k, dtype=H.dtype, device=H.device)
    L = torch.linalg.cholesky_ex(H + noise * eye).L
    pivots = L.diagonal(dim1=-2, dim2=-1)
    # A column of L^-T is the combination of directions that its pivot is the length of, and weighs noise likewise.
    weights = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False).square().sum(-1)
    clear = (pivots > 32 * torch.finfo(torch.float32).eps * pivots.amax(-1, keepdim=True)) & (
        4 * noise[..., 0] * weights < 1
    )
    dependent = ~clear  # so is one that is NaN, where the factorization broke off
    H = torch.where(dependent.unsqueeze(-1) | dependent.unsqueeze(-2), eye, H)
    T = orthonormalizer(H) / size.sqrt()
    T = torch.where(dependent.unsqueeze(-2), 0, T)
    return torch.cat([torch.cat([-lean @ T, T], dim=-2), mixed], dim=-1), dependent


def _last_combination(gram: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """C (B, c + k, c + k) and R (B, k, columns of X) of a :class:`Basis`, from [U Q]^T [U Q X].

    Q must be nearly orthonormal in its own columns, and generic in those that are not.
    """
    both = gram.shape[-2]
    lean, H = _without_span(gram[..., :both], c)
    T = orthonormalizer(H)
    right = torch.cat([-lean @ T, T], dim=-2)
    eye = torch.eye(both, c, dtype=gram.dtype, device=gram.device)
    left = 1.5 * eye - 0.5 * torch.nn.functional.pad(gram[..., :c, :c], (0, 0, 0, both - c))  # Newton-Schulz
    return torch.cat([left, right], dim=-1), (right.mT @ gram[..., both:]).float()


def _without_span(gram: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """(U^T U)^-1 U^T X, and the Gram matrix of X less its part in span U."""
    G, A, N = gram[..., :c, :c], gram[..., :c, c:], gram[..., c:, c:]
    lean = in_span(G, A)
    return lean, N - A.mT @ lean


def _with_room(side: Side) -> Side:
    """The side itself or, where it has fewer than c + k rows, the whole complement of span U instead of X.

    Any basis of it will do. Generic columns would not: where U was filled up with the same ones, none is left of them.
    """
    U, X, _ = side
    c = U.shape[-1]
    if U.shape[-2] >= c + X.shape[-1]:
        return side
    return Side(U, torch.linalg.qr(U.double(), mode="complete").Q[..., c:].to(X.dtype))


def _by_householder(U: Tensor, Y: Tensor) -> Basis:
    """:func:`complements` of one side in float64, where the squares of a Gram matrix would lose half the digits."""
    m, c = U.shape[-2:]
    live = live_rows(torch.cat([U, Y], dim=-1), c + Y.shape[-1])
    X = _project_out(U, _project_out(U, Y))
    if m < c + X.shape[-1]:
        Q = generic_columns(X, m - c)
    else:
        norm = X.norm(dim=(-2, -1), keepdim=True)
        size = torch.linalg.qr(X / torch.where(norm > 0, norm, 1)).R.diagonal(dim1=-2, dim2=-1).abs()
        least = 32 * torch.finfo(X.dtype).eps * size.amax(-1, keepdim=True)
        Q = torch.where((size <= least).unsqueeze(-2), generic_columns(X, X.shape[-1]), X)
    # A direction of relative size s keeps a part eps / s of span U, and a filled one all of its own.
    for _ in range(3):
        Q = torch.linalg.qr(live * _project_out(U, Q)).Q * live  # a reflection leaves rounding in rows of zeros
    both = c + Q.shape[-1]
    combination = torch.eye(both, dtype=X.dtype, device=X.device).repeat(len(X), 1, 1)
    combination[..., :c, :c] = 1.5 * combination[..., :c, :c] - 0.5 * U.mT @ U
    return Basis(U, Q, combination, Q.mT @ Y)


def _project_out(U: Tensor, Y: Tensor) -> Tensor:
    return Y - U @ (U.mT @ Y)


@functools.cache  # for ever: a CUDA graph may read them
def _generic_columns(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(m, k, generator=generator, dtype=torch.float64, device="cpu")
    return (drawn / math.sqrt(m)).to(device, dtype)
