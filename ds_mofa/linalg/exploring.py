"""Random directions beside the momentum's: pure functions on batches of matrices, as :mod:`ds_mofa.linalg.factors`.

U V^T moves r directions, and what the gradient G has beyond span U and span V is lost. So the sketches are taken with k
random columns more, E (n x k) and F (m x k), new in each step:

    Y = G [V E]      (m x R)          Z = G^T [U F]      (n x R)          R = r + k

The first r columns are MoFaSGD's. From the others, what is left of G where the momentum has nothing,

    H = (1 - U U^T) G (1 - V V^T) E      A = polar(H)
    J = (1 - V V^T) G^T (1 - U U^T) F    B = polar(J)        polar(P diag(s) Q^T) = P Q^T over the s > 0

and U V^T is joined by A E^T + F B^T: of all A of that norm and rank the one that lowers the loss most along E.

H lies in the span of [U Y]. So all but A itself is worked out on the Gram matrices of [U Y] and [V E], in float64: with D such
that H = [U Y] D and H^T H = Q diag(s^2) Q^T, it is A = [U Y] D Q diag(1 / s) Q^T.

E and F are signs / sqrt(n) and / sqrt(m), one random bit an element, so that every rank has them without a message.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_mofa.kernels import triton_serves
from ds_mofa.kernels.random_bits import mix
from ds_mofa.kernels.svd import rotations
from ds_mofa.linalg.batching import together
from ds_mofa.linalg.orthonormal import in_span, joined, live_rows, polished, sketch_gram

__all__ = ["Look", "directions", "look_grams", "sign_words", "signs"]


class Look(NamedTuple):
    """One side of a batch of gradients, seen along the momentum and along k random columns beside it.

    Attributes:
        U: (B, m, r), orthonormal: what the directions must be orthogonal to.
        Y: (B, m, r + k), the sketch G [V E]; of the other side G^T [U F].
        test: (B, n, r + k), the [V E] that it was taken with, V orthonormal to the rounding of 16 bits.
        grams: :func:`look_grams` of U and Y, where they are at hand.
    """

    U: Tensor
    Y: Tensor
    test: Tensor
    grams: tuple[Tensor, Tensor] | None = None


def look_grams(U: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """Of the sketches Y = [Y_r Y_k] the Gram matrix of [U Y_r] (B, 2 r, 2 r), which is the momentum's, and what [U Y] has in
    common with Y_k (B, 2 r + k, k); float64.
    """
    S, r = joined(U, Y), U.shape[-1]
    kept = S[..., : 2 * r]
    return kept.mT @ kept, S.mT @ S[..., 2 * r :]


def directions(looks: Sequence[Look]) -> Iterator[Tensor]:
    """polar((1 - U U^T) G (1 - V V^T) E) of each look in turn, (B, m, k), float64; what is small is done for all at once.

    At most min(m, n) - r of its k singular values are 1, the others 0: those of directions that are rounding. Of a
    gradient that the momentum sees all of, it is zero.
    """
    r, dtype = looks[0].U.shape[-1], looks[0].Y.dtype
    floor = 64 * torch.finfo(dtype).eps
    if dtype == torch.float64:
        yield from (_by_svd(look, floor) for look in looks)
        return
    grams = [(*(look.grams or look_grams(look.U, look.Y)), sketch_gram(look.test)) for look in looks]
    turns = together(grams, lambda kept, beside, test: (_turn(_whole(kept, beside), test, r, floor),))
    for look, (turn,) in zip(looks, turns):
        yield joined(look.U, look.Y) @ turn


def _whole(kept: Tensor, beside: Tensor) -> Tensor:
    """The Gram matrix of [U Y] from :func:`look_grams`."""
    c = kept.shape[-1]
    return torch.cat([torch.cat([kept, beside[..., :c, :].mT], dim=-2), beside], dim=-1)


def _turn(gram: Tensor, test: Tensor, r: int, floor: float) -> Tensor:
    """T (B, 2 r + k, k), float64, such that [U Y] T are the directions, from the Gram matrices of [U Y] and of [V E]."""
    beyond, seen = _beyond(test, r), gram[..., r:, r:]
    beyond = beyond / _size(*(_root_of_trace(part) for part in (seen[..., r:, r:], beyond.mT @ seen @ beyond)))
    D = torch.cat([-in_span(gram[..., :r, :r], gram[..., :r, r:] @ beyond), beyond], dim=-2)
    return D @ _inverse_root(D.mT @ gram @ D, floor)


def _inverse_root(gram: Tensor, floor: float) -> Tensor:
    """C^(-1/2) (B, k, k) of C, ``gram``, over its eigenvalues above floor^2, 0 over the others; C symmetric, float64, trace
    at most 1.

    The eigenvectors Q are those of fp32, refined once, and what they leave beside the diagonal of Q^T C Q = diag(s^2) + O is
    let in to first order: diag(1 / s) - O_ij / (s_i s_j (s_i + s_j)). So no digit is lost where the s are far apart.
    """
    Q = _refined(_right_vectors(gram), gram)
    nearly = Q.mT @ gram @ Q
    squares = nearly.diagonal(dim1=-2, dim2=-1)
    s = squares.masked_fill(squares <= floor * floor, torch.inf).sqrt()
    one, other = s.unsqueeze(-1), s.unsqueeze(-2)
    root = torch.diag_embed(1.5 / s) - nearly / (one * other * (one + other))  # which takes 0.5 / s from the diagonal
    T = Q @ root @ Q.mT
    return 1.5 * T - 0.5 * T @ (T.mT @ gram @ T)  # Newton-Schulz


def _refined(Q: Tensor, gram: Tensor) -> Tensor:
    """Q (B, k, k), nearly the eigenvectors of ``gram``, one step nearer: to the square of what they lacked.

    An error e of a vector of no eigenvalue shows as e^2 of the largest one, in fp32 near the floor that tells rounding.
    """
    nearly = Q.mT @ gram @ Q
    squares = nearly.diagonal(dim1=-2, dim2=-1)
    apart = squares.unsqueeze(-2) - squares.unsqueeze(-1)
    # Two of nearly one eigenvalue need no telling apart.
    small = nearly.abs() < 1e-3 * apart.abs()
    return polished(Q + Q @ torch.where(small, nearly / apart, 0))


def _beyond(test: Tensor, r: int) -> Tensor:
    """C (B, r + k, k), float64, with G (1 - P) E = Y C, P the projector onto V; from the Gram matrix of [V E]."""
    eye = torch.eye(test.shape[-1] - r, dtype=test.dtype, device=test.device).expand(len(test), -1, -1)
    inside = in_span(test[..., :r, :r], test[..., :r, r:], steps=2)  # V is of 16 bits
    return torch.cat([-inside, eye], dim=-2)


def _size(whole: Tensor, beyond: Tensor) -> Tensor:
    """|G E| + |G (1 - P) E|, (B, 1, 1), 1 where it is zero: their difference |G P E| is no larger. One floor over it tells
    rounding in all directions.
    """
    size = whole + beyond
    return size + (size == 0)


def _root_of_trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(0).sqrt()


def _right_vectors(gram: Tensor) -> Tensor:
    """Q (B, k, k), float64, orthonormal, that makes Q^T gram Q diagonal to fp32's rounding."""
    # gram = R^T R, and R in fp32 has twice its digits. What is added is above the rounding of gram and below every floor.
    shifted = gram + 1e-13 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    R = torch.linalg.cholesky_ex(shifted).L.mT.float()
    return polished(rotations(R) if triton_serves(R) else torch.linalg.svd(R).Vh.mT)


def _by_svd(look: Look, floor: float) -> Tensor:
    """:func:`directions` of one look in float64, where the squares of a Gram matrix would lose half the digits."""
    U, Y, test, _ = look
    r = U.shape[-1]
    X = Y @ _beyond(sketch_gram(test), r)
    size = _size(*(part.norm(dim=(-2, -1), keepdim=True) for part in (Y[..., r:], X)))
    for _ in range(2):
        X = X - U @ (U.mT @ X)
    basis, R = torch.linalg.qr(X / size)
    P, s, Qt = torch.linalg.svd(R, full_matrices=False)
    # A reflection leaves rounding in rows of zeros.
    return basis @ ((P * (s > floor).unsqueeze(-2)) @ Qt) * live_rows(X, 0)


def sign_words(counters: Tensor, key: int) -> Tensor:
    """32 random bits for each counter (int32, not negative), as int32: the same on every device."""
    return mix(counters.long() ^ key).to(torch.int32)


def signs(words: Tensor) -> Tensor:
    """The bits of int32 words (W,) from the lowest on as 1 for 0 and -1 for 1; int8 (32 W,)."""
    bits = words.view(torch.uint8).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=words.device)
    return bits.bitwise_and_(1).view(torch.int8).mul_(-2).add_(1).flatten()
