"""Random directions beside the momentum's: pure functions on batches of matrices, as :mod:`ds_mofa.factors`.

U V^T moves r directions, and what the gradient G has beyond span U and span V is lost. So the sketches are taken with k
random columns more, E (n x k) and F (m x k), new in each step:

    Y = G [V E]      (m x R)          Z = G^T [U F]      (n x R)          R = r + k

The first r columns are MoFaSGD's. From the others, what is left of G where the momentum has nothing,

    H = (1 - U U^T) G (1 - V V^T) E      A = polar(H)
    J = (1 - V V^T) G^T (1 - U U^T) F    B = polar(J)        polar(P diag(s) Q^T) = P Q^T over the s > 0

and U V^T is joined by A E^T + F B^T: of all A of that norm and rank the one that lowers the loss most along E.

E and F are signs / sqrt(n) and / sqrt(m), one random bit an element, so that every rank can have them without a message.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_mofa.batching import together
from ds_mofa.factors import leading_svd
from ds_mofa.orthonormal import Basis, Side, complements
from ds_mofa.weights import mix

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
    # Scaled by what it is the rest of, so that one floor tells rounding in all of them.
    rests = [_beyond(look) for look in looks]
    bases = complements([Side(look.U, rest) for look, rest in zip(looks, rests)])
    most = [min(look.U.shape[-2], look.test.shape[-2]) - look.U.shape[-1] for look in looks]
    turns = together([basis.R.to(look.Y.dtype) for basis, look in zip(bases, looks)], _polar, most)
    for basis, (turn,) in zip(bases, turns):
        yield _beside(basis, turn)


def _beyond(look: Look) -> Tensor:
    """G (1 - P) E, P the projector onto the columns V of ``test``, over |G E| + |G P E|; (B, m, k)."""
    _, Y, test = look
    r = look.U.shape[-1]
    wide = test.double()
    gram = wide.mT @ wide
    near, across = gram[..., :r, :r], gram[..., :r, r:]
    # P E = V (V^T V)^-1 V^T E. To the rounding of V that inverse is 2 - V^T V.
    inside = Y[..., :r] @ (2 * across - near @ across).to(Y.dtype)
    whole = Y[..., r:]
    # In float64: the squares of a tiny gradient are zero in fp32.
    size = sum(torch.linalg.vector_norm(one, dim=(-2, -1), keepdim=True, dtype=torch.float64) for one in (whole, inside))
    return (whole - inside) / torch.where(size > 0, size, 1).to(Y.dtype)


def _polar(R: Tensor, most: int) -> tuple[Tensor]:
    """P Q^T (B, p, k) of R = P diag(s) Q^T, |R| <= 1: over the ``most`` leading s, as far as they are not rounding."""
    count = min(most, *R.shape[-2:])
    if count <= 0:
        return (R.new_zeros(R.shape, dtype=torch.float64),)
    P, s, Q = leading_svd(R, count)
    live = s > 64 * torch.finfo(R.dtype).eps
    return ((P * live.unsqueeze(-2)) @ Q.mT,)


def _beside(basis: Basis, turn: Tensor) -> Tensor:
    """Q turn, Q the columns that ``basis`` has beside U."""
    c = basis.U.shape[-1]
    return basis.turned(torch.nn.functional.pad(turn, (0, 0, c, 0)))


def sign_words(counters: Tensor, key: int) -> Tensor:
    """32 random bits for each counter (int32, not negative), as int32: the same on every device."""
    return mix(counters.long() ^ key).to(torch.int32)


def signs(words: Tensor) -> Tensor:
    """The bits of int32 words (W,) from the lowest on as 1 for 0 and -1 for 1; int8 (32 W,)."""
    bits = words.view(torch.uint8).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=words.device)
    return bits.bitwise_and_(1).view(torch.int8).mul_(-2).add_(1).flatten()
