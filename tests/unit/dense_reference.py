"""What the fast paths must equal: the same mathematics with whole m x n matrices, in float64, one matrix at a time."""

import math

import torch
from torch import Tensor

from ds_mofa.linalg.factors import Factors


def random_orthonormal(m: int, r: int, generator: torch.Generator) -> Tensor:
    """(m, r) float64."""
    return torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64)).Q


def random_factors(m: int, n: int, r: int, generator: torch.Generator, smallest: float = 0.1) -> Factors:
    """A batch of one, sigma from 1 down to ``smallest``."""
    sigma = torch.logspace(0, math.log10(smallest), r, dtype=torch.float64)
    return Factors(random_orthonormal(m, r, generator)[None], sigma[None], random_orthonormal(n, r, generator)[None])


def dense(factors: Factors) -> Tensor:
    """U diag(sigma) V^T, (B, m, n), in float64."""
    U, sigma, V = (part.double() for part in factors)
    return U @ torch.diag_embed(sigma) @ V.mT


def sketches(factors: Factors, G: Tensor) -> tuple[Tensor, Tensor]:
    """Y = G V and Z = G^T U."""
    return G @ factors.V, G.mT @ factors.U


def tangent_projection(U: Tensor, V: Tensor, G: Tensor) -> Tensor:
    """U U^T G + G V V^T - U U^T G V V^T."""
    left, right = U @ U.mT, V @ V.mT
    return left @ G + G @ right - left @ G @ right


def next_momentum(factors: Factors, G: Tensor, beta: float, gamma: float) -> Tensor:
    """beta U sigma V^T + gamma G_hat before truncation, (B, m, n), in float64."""
    U, V = factors.U.double(), factors.V.double()
    return beta * dense(factors) + gamma * tangent_projection(U, V, G.double())


def truncated(M: Tensor, r: int) -> Tensor:
    """The best rank-r approximation of M."""
    P, s, Qt = torch.linalg.svd(M, full_matrices=False)
    return P[..., :r] @ torch.diag_embed(s[..., :r]) @ Qt[..., :r, :]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def departure_from_orthonormal(U: Tensor) -> float:
    """The largest entry of |U^T U - 1|."""
    U = U.double()
    return float((U.mT @ U - torch.eye(U.shape[-1], dtype=torch.float64)).abs().max())
