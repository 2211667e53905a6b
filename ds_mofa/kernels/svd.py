"""Batched small SVD by one-sided Jacobi, one thread block a matrix.

The library's batched SVD goes through one matrix after another above 32 x 32: 226 ms for the 224 cores of an
8B model at rank 32. One-sided Jacobi (Hestenes) orthogonalises the columns of K by plane rotations, n / 2
disjoint pairs at a time, and needs nothing but dot products: K J -> columns P sigma, J -> Q.
"""

import torch
from torch import Tensor

__all__ = ["jacobi_svd", "jacobi_svd_twin"]

_MAX_SWEEPS = 16  # 6 to 9 are used; a matrix that needs more is not getting better
_TOLERANCE = 1e-6  # cosine between two columns that counts as orthogonal, in fp32


def jacobi_svd(K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K Q, sigma, Q of K (B, p, q) on a GPU, fp32, sigma descending.

    Returns:
        K Q: (B, p, q), the left singular vectors times sigma; zero where sigma is.
        sigma: (B, q).
        Q: (B, q, q), orthonormal for every K.
    """
    from ds_mofa.kernels import _jacobi

    B, p, q = K.shape
    even = q + q % 2  # a zero column plays with the odd one out
    columns = K.new_zeros(B, even, p)
    columns[:, :q] = K.mT
    rotations = torch.eye(even, dtype=K.dtype, device=K.device).repeat(B, 1, 1)
    _jacobi.launch(columns, rotations, _MAX_SWEEPS, _TOLERANCE)
    Q = rotations[:, :q, :q].mT  # the zero column has turned with none
    # Thousands of rotations change a column's length in the fifth digit: take it, and K's part, anew.
    Q = Q / Q.square().sum(-2, keepdim=True).sqrt()
    scaled = K @ Q
    sigma, order = scaled.square().sum(-2).sqrt().sort(dim=-1, descending=True, stable=True)
    order = order.unsqueeze(-2)
    return scaled.gather(-1, order.expand_as(scaled)), sigma, Q.gather(-1, order.expand_as(Q))


def jacobi_svd_twin(K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`jacobi_svd` returns, from the library's SVD."""
    _, sigma, Qt = torch.linalg.svd(K, full_matrices=True)
    sigma = torch.nn.functional.pad(sigma, (0, K.shape[-1] - sigma.shape[-1]))
    return K @ Qt.mT, sigma, Qt.mT
