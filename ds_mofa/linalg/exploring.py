"""Random directions beside the momentum's: pure functions on batches of matrices, as :mod:`ds_mofa.linalg.factors`.

U V^T moves r directions, and what the gradient G has beyond span U and span V is lost. So the sketches are taken with k
random columns more, E (n x k) and F (m x k), new in each step:

    Y = G [V E]      (m x R)          Z = G^T [U F]      (n x R)          R = r + k

The first r columns are MoFaSGD's. From the others, what is left of G where the momentum has nothing,

    H = (1 - U U^T) G (1 - V V^T) E      A = polar(H)
    J = (1 - V V^T) G^T (1 - U U^T) F    B = polar(J)        polar(P diag(s) Q^T) = P Q^T over the s > 0

and U V^T is joined by A E^T + F B^T: of all A of that norm and rank the one that lowers the loss most along E.

E and F are signs / sqrt(n) and / sqrt(m), one random bit an element, so that every rank has them without a message.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_mofa.kernels.random_bits import mix
from ds_mofa.linalg.batching import together
from ds_mofa.linalg.factors import leading_svd
from ds_mofa.linalg.orthonormal import Side, complements

__all__ = ["Look", "directions", "sign_words", "signs"]


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
    bases = complements([Side(look.U, rest) for look, rest in zip(looks, rests)])
    # Over what they are the rest of, so that one floor tells rounding in all of them.
    inner = [basis.R.to(rest.dtype) / size for basis, rest, size in zip(bases, rests, _sizes(looks, rests))]
    counts = [min(*R.shape[-2:], look.test.shape[-2] - look.U.shape[-1]) for look, R in zip(looks, inner)]
    for basis, (turn,) in zip(bases, together(inner, _polar, counts)):
        yield basis.beside(turn)


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


def _polar(R: Tensor, count: int) -> tuple[Tensor]:
    """P Q^T (B, p, k) of R = P diag(s) Q^T, |R| <= 1: over the ``count`` leading s, as far as they are not rounding."""
    if count == 0:
        return (R.new_zeros(R.shape, dtype=torch.float64),)
    P, s, Q = leading_svd(R, count)
    live = s > 64 * torch.finfo(R.dtype).eps
    return ((P * live.unsqueeze(-2)) @ Q.mT,)


def sign_words(counters: Tensor, key: int) -> Tensor:
    """32 random bits for each counter (int32, not negative), as int32: the same on every device."""
    return mix(counters.long() ^ key).to(torch.int32)


def signs(words: Tensor) -> Tensor:
    """The bits of int32 words (W,) from the lowest on as 1 for 0 and -1 for 1; int8 (32 W,)."""
    bits = words.view(torch.uint8).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=words.device)
    return bits.bitwise_and_(1).view(torch.int8).mul_(-2).add_(1).flatten()
