"""The mathematics of MoFaSGD (arXiv 2507.08091): pure functions on batches of matrices.

Nothing here knows of ranks, parameters or state. Every function takes and returns tensors whose
leading dimension B is a batch of matrices of one shape, so that one call serves all layers:

    U (B, m, r)   sigma (B, r)   V (B, n, r)     the momentum's rank-r SVD, the *factors*
    Y (B, m, r)   Z (B, n, r)                    the gradient's *sketches*, Y = G V and Z = G^T U

All are float32 (float64 in tests), on any device. Inputs must be finite: the caller decides, once
for all ranks, whether a step with a NaN or Inf in it is skipped.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ds_mofa.kernels import triton_serves
from ds_mofa.kernels.svd import jacobi_svd

__all__ = ["Factors", "update_factors", "start_factors", "projected_norm", "orthonormal_complement", "live_directions"]


_EXACT = torch.finfo(torch.float64).eps


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
    U, sigma, V = factors
    r = sigma.shape[-1]
    A = U.mT @ Y
    Q_U, R_U = orthonormal_complement(U, Y)
    Q_V, R_V = orthonormal_complement(V, Z)

    top = torch.cat([beta * torch.diag_embed(sigma) + gamma * A, gamma * R_V.mT], dim=-1)
    bottom = torch.cat([gamma * R_U, R_U.new_zeros(*R_U.shape[:-1], R_V.shape[-2])], dim=-1)
    P, sigma, Q = _leading_svd(torch.cat([top, bottom], dim=-2), r)

    still = (sigma[..., :1] == 0).unsqueeze(-1)  # any orthonormal P and Q diagonalise a zero core
    return Factors(torch.where(still, U, _rotate(U, Q_U, P)), sigma, torch.where(still, V, _rotate(V, Q_V, Q)))


def start_factors(Y: Tensor, Z: Tensor, psi: Tensor, *, gamma: float) -> Factors:
    """The first momentum, gamma G, from one look at the gradient (Tropp, Yurtsever, Udell, Cevher 2017).

    The first step has no U and V to sketch with, so it uses random test matrices in their place:
    Y = G Omega and Z = G^T Psi. With Q the leading c left singular vectors of Y,

        G  ~  Q (Psi^T Q)^+ Z^T.

    c = ceil(r / 2): the least-squares problem (Psi^T Q) X = Z^T then has about twice as many equations
    as unknowns, which is what keeps its error within a small factor of the best rank-c one. The other
    r - c directions start with sigma = 0 and are filled by the next gradients. A gradient of rank <= c
    is recovered exactly.

    Args:
        Y: G Omega, (B, m, r), Omega (n, r) Gaussian.
        Z: G^T Psi, (B, n, r).
        psi: the Psi that Z was made with, (B, m, r).
        gamma: weight of the gradient, as in :func:`update_factors`.
    """
    r = Y.shape[-1]
    c = (r + 1) // 2
    Q, R = torch.linalg.qr(Y)
    Q = Q @ torch.linalg.svd(R).U[..., :c]
    X = torch.linalg.pinv(psi.mT @ Q) @ Z.mT  # (B, c, n)
    V, T = torch.linalg.qr(X.mT)  # X = T^T V^T
    P, sigma, Wt = torch.linalg.svd(T.mT)
    sigma = torch.cat([gamma * sigma, sigma.new_zeros(*sigma.shape[:-1], r - c)], dim=-1)
    return Factors(_complete(Q @ P, r), sigma, _complete(V @ Wt.mT, r))


def projected_norm(U: Tensor, Y: Tensor, Z: Tensor) -> Tensor:
    """Squared Frobenius norm of G_hat, (B,), from the sketches alone: |Y|^2 + |Z|^2 - |U^T Y|^2."""
    A = U.mT @ Y
    return (_square_sum(Y) + _square_sum(Z) - _square_sum(A)).clamp_min(0)


def live_directions(sigma: Tensor) -> Tensor:
    """1 where a direction holds momentum, 0 where sigma is zero to rounding; (B, r), dtype of sigma.

    The spectral update U V^T gives each direction the same length. A direction without momentum is an
    arbitrary vector that only completes the basis, and must not move the weights.
    """
    floor = 2 * sigma.shape[-1] * torch.finfo(sigma.dtype).eps
    return (sigma > floor * sigma[..., :1]).to(sigma.dtype)


def orthonormal_complement(U: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """Q (B, m, k) and R (B, k, r) with Y = U U^T Y + Q R, [U Q] orthonormal, k = min(r, m - r).

    Only the r new directions are orthonormalised, U is left as it is. Q is orthonormal for every Y: a
    direction that Y does not have (rank-deficient, zero, or inside span U) is filled with an
    arbitrary one and gets zero in R.
    """
    m, r = U.shape[-2:]
    eps = torch.finfo(U.dtype).eps
    basis, Y = U.double(), Y.double()
    Y = _project_out(basis, _project_out(basis, Y))
    fill = _fill_in(basis, min(r, m - r))
    # With fewer than 2 r rows there is room for the whole complement of span U: any basis of it will do.
    Q = fill if m < 2 * r else _replace_dependent(Y, fill, eps)
    # A direction of relative size s keeps a part eps / s of span U, and a filled one all of its own.
    for _ in range(3):
        Q = _orthonormalise(_project_out(basis, Q), eps)
    return Q.to(U.dtype), (Q.mT @ Y).to(U.dtype)


def _orthonormalise(X: Tensor, eps: float) -> Tensor:
    """Orthonormal columns that span those of X (B, m, k), float64, for data that is good to ``eps``.

    Cholesky-QR, all products: X = Q L^T with L L^T = X^T X is right to 1e-16 cond(X)^2, so that a second pass
    finishes what a first one leaves. Data that is itself float64 needs Householder's QR.
    """
    if eps == _EXACT:
        return torch.linalg.qr(X).Q
    X = X / _scale(X)
    L = _cholesky(X)
    # A product with the small inverse: a GPU solves for m right-hand sides more slowly than it multiplies.
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    return X @ torch.linalg.solve_triangular(L, identity, upper=False).mT


def _replace_dependent(X: Tensor, fill: Tensor, eps: float) -> Tensor:
    """X (B, m, k) with every column that depends on those before it, to ``32 eps``, replaced by that of ``fill``."""
    X = X / _scale(X)
    factor = torch.linalg.qr(X).R if eps == _EXACT else _cholesky(X)
    size = factor.diagonal(dim1=-2, dim2=-1).abs()
    least = (32 * eps * size.amax(-1, keepdim=True)).clamp_min(2 * _shift(X) ** 0.5 if eps != _EXACT else 0.0)
    return torch.where((size <= least).unsqueeze(-2), fill, X)


def _cholesky(X: Tensor) -> Tensor:
    """L (B, k, k) with L L^T = X^T X, for X of norm 1."""
    gram = X.mT @ X
    gram.diagonal(dim1=-2, dim2=-1).add_(_shift(X))
    return torch.linalg.cholesky_ex(gram).L


def _shift(X: Tensor) -> float:
    """Keeps the Gram matrix of a singular X of norm 1 positive."""
    return 4 * X.shape[-1] * torch.finfo(X.dtype).eps


def _scale(X: Tensor) -> Tensor:
    norm = X.norm(dim=(-2, -1), keepdim=True)
    return torch.where(norm > 0, norm, 1)


def _leading_svd(K: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """P (B, p, r), sigma (B, r), Q (B, q, r) of K (B, p, q): its r leading singular triplets."""
    if not triton_serves(K):
        P, sigma, Qt = torch.linalg.svd(K, full_matrices=False)
        return P[..., :r], sigma[..., :r], Qt[..., :r, :].mT
    scaled, sigma, Q = (x[..., :r] for x in jacobi_svd(K))
    # The columns of K Q are P sigma; where sigma vanishes there is no P in them, and any will do.
    eps = torch.finfo(K.dtype).eps
    P = scaled.double() / sigma.clamp_min(torch.finfo(K.dtype).tiny).unsqueeze(-2)
    P = _replace_dependent(P, _fill_in(P, r), eps)
    for _ in range(2):
        P = _orthonormalise(P, eps)
    return P.to(K.dtype), sigma, Q


def _rotate(U: Tensor, Q: Tensor, P: Tensor) -> Tensor:
    """[U Q] P, polished by one Newton-Schulz step so that rounding does not add up over the steps."""
    r = U.shape[-1]
    U = U @ P[..., :r, :] + Q @ P[..., r:, :]
    return 1.5 * U - 0.5 * U @ (U.mT @ U)


def _complete(U: Tensor, r: int) -> Tensor:
    """Orthonormal columns U (B, m, c) followed by r - c others, orthonormal to them."""
    fill = _fill_in(U, r - U.shape[-1])
    for _ in range(2):
        fill = torch.linalg.qr(_project_out(U, fill)).Q
    return torch.cat([U, fill], dim=-1)


def _project_out(U: Tensor, Y: Tensor) -> Tensor:
    return Y - U @ (U.mT @ Y)


def _fill_in(like: Tensor, k: int) -> Tensor:
    """(B, m, k) fixed generic columns of norm about 1: the same on every rank and in every run."""
    return _generic_columns(like.shape[-2], k, like.dtype, like.device).expand(*like.shape[:-2], -1, -1)


@functools.lru_cache(maxsize=64)
def _generic_columns(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(m, k, generator=generator, dtype=torch.float64) / math.sqrt(m)).to(device, dtype)


def _square_sum(X: Tensor) -> Tensor:
    return X.square().sum((-2, -1))
