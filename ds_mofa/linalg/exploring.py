"""Random directions beside the momentum's: pure functions on batches of matrices, as :mod:`ds_mofa.linalg.factors`.

U V^T moves r directions, and what the gradient G has beyond span U and span V is lost. So the sketches are taken with k
random columns more, E (n x k) and F (m x k), new in each step:

    Y = G [V E]      (m x R)          Z = G^T [U F]      (n x R)          R = r + k

The first r columns are MoFaSGD's. From the others, what is left of G where the momentum has nothing,

    H = (1 - U U^T) G (1 - V V^T) E      A = polar(H)
    J = (1 - V V^T) G^T (1 - U U^T) F    B = polar(J)        polar(P diag(s) Q^T) = P Q^T over the s > 0

and U V^T is joined by A E^T + F B^T: of all A of that norm and rank the one that lowers the loss most along E.

All but two passes over the long columns is done on Gram matrices in float64: X^T X has the right singular vectors of X, and
polar(X) = X (X^T X)^(-1/2).

E and F are signs / sqrt(n) and / sqrt(m), one random bit an element, so that every rank has them without a message.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_mofa.kernels import triton_serves
from ds_mofa.kernels.random_bits import mix
from ds_mofa.kernels.svd import jacobi_svd
from ds_mofa.linalg.batching import together
from ds_mofa.linalg.orthonormal import sketch_gram

__all__ = ["Look", "directions", "sign_words", "signs"]

_SQUARED = 1e-7  # a singular value of float64 columns below which its square is lost in the Gram matrix


class Look(NamedTuple):
    """One side of a batch of gradients, seen along the momentum and along k random columns beside it.

    Attributes:
        U: (B, m, r), orthonormal: what the directions must be orthogonal to.
        Y: (B, m, r + k), the sketch G [V E]; of the other side G^T [U F].
        test: (B, n, r + k), the [V E] that it was taken with, V orthonormal to the rounding of 16 bits.
    """

    U: Tensor
    Y: Tensor
    test: Tensor


def directions(looks: Sequence[Look]) -> Iterator[Tensor]:
    """polar((1 - U U^T) G (1 - V V^T) E) of each look in turn, (B, m, k); what is small is done for all at once.

    At most min(m, n) - r of its k singular values are 1, the others 0: those of directions that are rounding. Of a
    gradient that the momentum sees all of, it is zero.
    """
    rests = _beyond(looks)
    # Over what they are the rest of, so that one floor tells rounding in all of them.
    sizes = _sizes(looks, rests)
    grams = [sketch_gram(look.U, rest / size) for look, rest, size in zip(looks, rests, sizes)]
    kept = [look.U.shape[-1] for look in looks]
    counts = [
        min(rest.shape[-1], look.U.shape[-2] - c, look.test.shape[-2] - c) for look, rest, c in zip(looks, rests, kept)
    ]
    floor = max(64 * torch.finfo(rests[0].dtype).eps, _SQUARED)
    kinds = list(zip(kept, counts))
    roots = together(grams, lambda gram, kind: (_root(gram, *kind, floor=floor),), kinds)
    for look, rest, size, (turn,) in zip(looks, rests, sizes, roots):
        columns = torch.cat([look.U, rest / size], dim=-1).double()
        yield (columns @ turn).to(rest.dtype)


def _root(gram: Tensor, c: int, count: int, *, floor: float) -> Tensor:
    """T (B, c + k, k), float64, with [U X] T = polar((1 - U U^T) X), from the Gram matrix of [U X]; U (m, c).

    Over the ``count`` leading singular values, as far as they are above ``floor``.
    """
    near, across, own = gram[..., :c, :c], gram[..., :c, c:], gram[..., c:, c:]
    inside = 2 * across - near @ across  # (U^T U)^-1 U^T X, as in _coordinates
    H = own - inside.mT @ across - across.mT @ inside + inside.mT @ near @ inside  # X'^T X', X' = X - U inside
    H = 0.5 * (H + H.mT)
    vectors = _eigenvectors(H)[..., :count]
    squares = (vectors * (H @ vectors)).sum(-2)
    live = squares > floor * floor
    inverse = live / torch.where(live, squares, 1).sqrt()
    T = (vectors * inverse.unsqueeze(-2)) @ vectors.mT
    # Newton-Schulz: where the vectors are of fp32, the columns come out orthonormal to the square of what they were.
    T = T @ (1.5 * torch.eye(T.shape[-1], dtype=T.dtype, device=T.device) - 0.5 * T.mT @ H @ T)
    return torch.cat([-inside @ T, T], dim=-2)


def _eigenvectors(H: Tensor) -> Tensor:
    """Of H (B, k, k), float64, not negative: orthonormal columns, those of the largest first."""
    if not triton_serves(H.float()):
        return torch.linalg.eigh(H).eigenvectors.flip(-1)
    # H = R^T R, and R has twice the digits of H in fp32; the shift is below every floor.
    shift = 1e-14 * H.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    R = torch.linalg.cholesky_ex(H + (shift + 1e-300) * torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)).L.mT
    _, _, Q = jacobi_svd(R.float())
    Q = Q.double()
    return 1.5 * Q - 0.5 * Q @ (Q.mT @ Q)


def _beyond(looks: Sequence[Look]) -> list[Tensor]:
    """G (1 - P) E of each, (B, m, k), P the projector onto the columns V of ``test``."""
    grams = []
    for _, _, test in looks:
        wide = test.double()
        grams.append(wide.mT @ wide)
    r, dtype = looks[0].U.shape[-1], looks[0].Y.dtype
    insides = together(grams, lambda gram: (_coordinates(gram, r).to(dtype),))
    return [
        torch.baddbmm(Y[..., r:], Y[..., :r], inside, alpha=-1)  # G E - (G V) (P E in the coordinates of V)
        for (_, Y, _), (inside,) in zip(looks, insides)
    ]


def _coordinates(gram: Tensor, r: int) -> Tensor:
    """C (B, r, k) with P E = V C, from the Gram matrix of [V E]."""
    near, across = gram[..., :r, :r], gram[..., :r, r:]
    return 2 * across - near @ across  # (V^T V)^-1 V^T E: that inverse is 2 - V^T V to the square of V's rounding


def _sizes(looks: Sequence[Look], rests: Sequence[Tensor]) -> Sequence[Tensor]:
    """|G E| + |G (1 - P) E|, (B, 1, 1), 1 where it is zero: their difference |G P E| is no larger."""
    norms = [
        # In float64: the squares of a tiny gradient are zero in fp32.
        torch.linalg.vector_norm(part, dim=(-2, -1), keepdim=True, dtype=torch.float64)
        for (U, Y, _), rest in zip(looks, rests)
        for part in (Y[..., U.shape[-1] :], rest)
    ]
    sizes = torch.cat(norms[::2]) + torch.cat(norms[1::2])
    return torch.where(sizes > 0, sizes, 1).to(rests[0].dtype).split([len(rest) for rest in rests])


def sign_words(counters: Tensor, key: int) -> Tensor:
    """32 random bits for each counter (int32, not negative), as int32: the same on every device."""
    return mix(counters.long() ^ key).to(torch.int32)


def signs(words: Tensor) -> Tensor:
    """The bits of int32 words (W,) from the lowest on as 1 for 0 and -1 for 1; int8 (32 W,)."""
    bits = words.view(torch.uint8).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=words.device)
    return bits.bitwise_and_(1).view(torch.int8).mul_(-2).add_(1).flatten()
