"""The mathematics of MoFaSGD (arXiv 2507.08091): pure functions on batches of matrices.

Nothing here knows of ranks, parameters or state. Every function takes and returns tensors whose
leading dimension B is a batch of matrices of one shape, so that one call serves all layers:

    U (B, m, r)   sigma (B, r)   V (B, n, r)     the momentum's rank-r SVD, the *factors*
    Y (B, m, r)   Z (B, n, r)                    the gradient's *sketches*, Y = G V and Z = G^T U

All are float32 (float64 in tests), on any device. Inputs must be finite: the caller decides, once
for all ranks, whether a step with a NaN or Inf in it is skipped.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_mofa.kernels import triton_serves
from ds_mofa.kernels.svd import jacobi_svd
from ds_mofa.linalg.batching import together
from ds_mofa.linalg.orthonormal import (
    Side,
    complements,
    generic_columns,
    live_rows,
    orthonormalizer,
    polished,
    sketch_gram,
)

__all__ = [
    "Factors",
    "update_factors",
    "update_many",
    "start_factors",
    "waiting_factors",
    "gradient_came",
    "gram_matrices",
    "projected_norm",
    "live_directions",
    "leading_svd",
    "resized",
]


class Factors(NamedTuple):
    """A rank-r momentum U diag(sigma) V^T: U (B, m, r) and V (B, n, r) orthonormal, sigma (B, r) descending."""

    U: Tensor
    sigma: Tensor
    V: Tensor


def update_factors(factors: Factors, Y: Tensor, Z: Tensor, *, beta: float, gamma: float) -> Factors:
    """Move the momentum by one gradient: the rank-r truncation of beta U sigma V^T + gamma G_hat.

    G_hat = U U^T G + G V V^T - U U^T G V V^T is the gradient's projection onto the tangent space of
    the rank-r matrices at the momentum (paper, Theorem 4.3). With A = U^T Y, Y = U A + Q_U R_U and
    Z = V A^T + Q_V R_V, everything that can be non-zero lies in the core

        K = [[beta diag(sigma) + gamma A,  gamma R_V^T],
             [gamma R_U,                   0          ]]

    between the orthonormal bases [U Q_U] and [V Q_V], so the truncated SVD of K gives the answer
    without an m x n matrix. K is (r + k_U) x (r + k_V) with k_U = min(r, m - r), likewise k_V.

    Args:
        factors: the momentum before the step.
        Y: G V, (B, m, r).
        Z: G^T U, (B, n, r).
        beta: decay of the old momentum, 0 <= beta < 1.
        gamma: weight of the gradient; 1 - beta for an average, 1 for heavy ball.

    Returns:
        The new factors. Where K is exactly zero (no momentum and no gradient) U and V stay.
    """
    [new] = update_many([(factors, Y, Z)], beta=beta, gamma=gamma)
    still = (new.sigma[..., :1] == 0).unsqueeze(-1)  # any orthonormal P and Q diagonalise a zero core
    return Factors(torch.where(still, factors.U, new.U), new.sigma, torch.where(still, factors.V, new.V))


Batch = tuple[Factors, Tensor, Tensor]  # factors, Y, Z
Grams = tuple[Tensor, Tensor]  # sketch_gram of (U, Y) and of (V, Z)


def update_many(
    batches: Sequence[Batch], *, beta: float, gamma: float | Tensor, grams: Sequence[Grams] | None = None
) -> list[Factors]:
    """:func:`update_factors` of several batches, which may differ in m and n; what is r x r is done for all at once.

    Of a core that is exactly zero U and V may become others here.

    Args:
        batches: factors, Y and Z of each; of one rank.
        beta: decay of the old momentum.
        gamma: weight of the gradient; a tensor has one element.
        grams: what :func:`gram_matrices` gives for each batch, where it is at hand.
    """
    if grams is None:
        grams = [gram_matrices(*batch) for batch in batches]
    sides = []
    for (factors, Y, Z), (left, right) in zip(batches, grams):
        sides += [Side(factors.U, Y, left), Side(factors.V, Z, right)]
    bases = complements(sides)
    left_bases, right_bases = bases[::2], bases[1::2]
    r = batches[0][0].sigma.shape[-1]
    parts = [
        (factors.sigma, gram[..., :r, r:], left.R, right.R)
        for (factors, _, _), (gram, _), left, right in zip(batches, grams, left_bases, right_bases)
    ]

    def decomposed(sigma: Tensor, A: Tensor, R_U: Tensor, R_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return leading_svd(_core(sigma, A, R_U, R_V, beta, gamma), r)

    turns = together(parts, decomposed)
    return [
        Factors(left.turned(P), sigma, right.turned(Q))
        for left, right, (P, sigma, Q) in zip(left_bases, right_bases, turns)
    ]


def gram_matrices(factors: Factors, Y: Tensor, Z: Tensor) -> Grams:
    """The Gram matrices of [U Y] and [V Z], (B, 2 r, 2 r), float64: all that :func:`projected_norm` needs."""
    return sketch_gram(factors.U, Y), sketch_gram(factors.V, Z)


def _core(sigma: Tensor, A: Tensor, R_U: Tensor, R_V: Tensor, beta: float, gamma: float | Tensor) -> Tensor:
    """K of :func:`update_factors`, in sigma's dtype."""
    top = torch.cat([A.to(sigma.dtype), R_V.mT], dim=-1)
    bottom = torch.cat([R_U, R_U.new_zeros(*R_U.shape[:-1], R_V.shape[-2])], dim=-1)
    K = gamma * torch.cat([top, bottom], dim=-2)
    K.diagonal(dim1=-2, dim2=-1)[..., : sigma.shape[-1]].add_(sigma, alpha=beta)
    return K


def start_factors(Y: Tensor, Z: Tensor, psi: Tensor, *, gamma: float | Tensor) -> Factors:
    """The first momentum, gamma G, from one look at the gradient (Tropp, Yurtsever, Udell, Cevher 2017).

    The first step has no U and V to sketch with, so it uses random test matrices in their place:
    Y = G Omega and Z = G^T Psi. With Q the leading c left singular vectors of Y,

        G  ~  Q (Psi^T Q)^+ Z^T.

    c = ceil(r / 2): the least-squares problem (Psi^T Q) X = Z^T then has about twice as many equations
    as unknowns, which is what keeps its error within a small factor of the best rank-c one. The other
    r - c directions start with sigma = 0 and are filled by the next gradients. A gradient of rank <= c
    is recovered exactly; where it has fewer directions, as of an expert of few tokens, so has the momentum.

    Args:
        Y: G Omega, (B, m, r), Omega (n, r) Gaussian.
        Z: G^T Psi, (B, n, r).
        psi: the Psi that Z was made with, (B, m, r).
        gamma: weight of the gradient, as in :func:`update_factors`.
    """
    r = Y.shape[-1]
    c = (r + 1) // 2
    Q, R = torch.linalg.qr(Y)
    Q = Q * live_rows(Y, r)  # a reflection leaves rounding in rows of zeros
    Q = Q @ torch.linalg.svd(R).U[..., :c]
    X = torch.linalg.pinv(psi.mT @ Q) @ Z.mT  # (B, c, n)
    V, T = torch.linalg.qr(X.mT)  # X = T^T V^T
    P, sigma, Wt = torch.linalg.svd(T.mT)
    return _begun(Factors(Q @ P, gamma * sigma, V @ Wt.mT), r)


def _begun(found: Factors, r: int) -> Factors:
    """Factors of rank c <= r as factors of rank r. What is no more than rounding beside the largest sigma is left out, and
    fixed columns stand in its place.
    """
    U, sigma, V = found
    counts = live_directions(sigma).sum(-1).long()
    out = Factors(*(sigma.new_zeros(*shape, r) for shape in (U.shape[:-1], sigma.shape[:-1], V.shape[:-1])))
    for count in counts.unique().tolist():
        of = counts == count
        out.U[of] = _complete(U[of][..., :count], r)
        out.V[of] = _complete(V[of][..., :count], r)
        out.sigma[of, :count] = sigma[of, :count]
    return out


def waiting_factors(psi: Tensor, omega: Tensor) -> Factors:
    """The factors of a matrix whose first gradient has not come by the first step: no momentum, random directions.

    What comes then is met by :func:`update_factors`, whose projection would see nothing of a gradient beyond fixed
    directions.

    Args:
        psi: the test matrices of the first step, (B, m, r) and full rank.
        omega: likewise, (B, n, r).
    """
    return Factors(torch.linalg.qr(psi).Q, psi.new_zeros(psi.shape[0], psi.shape[-1]), torch.linalg.qr(omega).Q)


def gradient_came(Y: Tensor, Z: Tensor) -> Tensor:
    """Which matrices have had a gradient, (B,) bool: those with a number that is not zero, a NaN too, in a sketch."""
    return Y.flatten(1).any(1) | Z.flatten(1).any(1)


def projected_norm(left: Tensor, right: Tensor) -> Tensor:
    """Squared Frobenius norm of G_hat, (B,), from :func:`gram_matrices` alone: |Y|^2 + |Z|^2 - |U^T Y|^2."""
    r = left.shape[-1] // 2
    of_Y, of_Z = (gram.diagonal(dim1=-2, dim2=-1)[..., r:].sum(-1) for gram in (left, right))
    return (of_Y + of_Z - left[..., :r, r:].square().sum((-2, -1))).clamp_min(0)


def live_directions(sigma: Tensor) -> Tensor:
    """1 where a direction holds momentum, 0 where sigma is zero to rounding; (B, r), dtype of sigma.

    The spectral update U V^T gives each direction the same length. A direction without momentum is an
    arbitrary vector that only completes the basis, and must not move the weights.
    """
    floor = 2 * sigma.shape[-1] * torch.finfo(sigma.dtype).eps
    return (sigma > floor * sigma[..., :1]).to(sigma.dtype)


def leading_svd(K: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """P (B, p, r), sigma (B, r), Q (B, q, r): the r leading singular triplets of K (B, p, q); P and Q in float64.

    Where sigma is zero to rounding it is zero, and fixed columns stand in P and Q: the next gradient is projected on all
    directions, and noise among them would be another in every run.
    """
    P, sigma, Q = _leading_svd(K, r)
    live = live_directions(sigma)
    filled = together([(P, live), (Q, live)], lambda columns, live: (_filled(columns, live),))
    return filled[0][0], sigma * live, filled[1][0]


def _leading_svd(K: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """P, sigma and Q in K's dtype, P and Q orthonormal to rounding over sigma."""
    if not triton_serves(K):
        P, sigma, Qt = torch.linalg.svd(K, full_matrices=False)
        return P[..., :r], sigma[..., :r], Qt[..., :r, :].mT
    scaled, sigma, Q = (x[..., :r] for x in jacobi_svd(K))
    # The columns of K Q are P sigma; where sigma vanishes there is no P in them.
    return scaled / sigma.clamp_min(torch.finfo(K.dtype).tiny).unsqueeze(-2), sigma, Q


def _filled(P: Tensor, live: Tensor) -> Tensor:
    """Columns P (B, p, r), nearly orthonormal where they are live (B, r), as orthonormal ones in float64: the factors are
    turned by one P after another. Fixed columns stand in for the others.
    """
    P = P.double()
    S = torch.where(live.unsqueeze(-2) > 0, P, generic_columns(P, P.shape[-1]))
    return polished(S @ orthonormalizer(S.mT @ S))  # from the first to the last: what is live comes before what is not


def _complete(U: Tensor, r: int) -> Tensor:
    """Orthonormal columns U (B, m, c) followed by r - c others, orthonormal to them, zero where U's rows are."""
    live = live_rows(U, r)
    fill = generic_columns(U, r - U.shape[-1]) * live
    for _ in range(2):
        fill = torch.linalg.qr(fill - U @ (U.mT @ fill)).Q * live
    return torch.cat([U, fill], dim=-1)


def resized(factors: Factors, r: int) -> Factors:
    """The factors at another rank: its best rank-r approximation where they shrink, the same momentum where they grow.

    The directions that growing adds are orthonormal to the others and start with sigma = 0: they hold no momentum,
    move no weight, and are turned towards the gradient by the next update.

    Args:
        factors: of any rank; sigma descending.
        r: 1 <= r <= min(m, n).
    """
    U, sigma, V = factors
    new = r - sigma.shape[-1]
    if new <= 0:
        return Factors(U[..., :r], sigma[..., :r], V[..., :r])
    sigma = torch.cat([sigma, sigma.new_zeros(*sigma.shape[:-1], new)], dim=-1)
    # Filled in float64: what is there already stays bit for bit, what is new is orthonormal to rounding.
    return Factors(_complete(U.double(), r).to(U.dtype), sigma, _complete(V.double(), r).to(V.dtype))
