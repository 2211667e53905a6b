"""What is orthogonal to a subspace."""

import torch
from torch import Tensor

from ds_mofa.linalg.orthonormal import Side, complements

__all__ = ["beside", "orthonormal_beside"]


def beside(U: Tensor, X: Tensor) -> Tensor:
    """(1 - U U^T) X."""
    return X - U @ (U.mT @ X)


def orthonormal_beside(V: Tensor, X: Tensor) -> Tensor:
    """Orthonormal columns that span (1 - V V^T) X, (B, n, k)."""
    [basis] = complements([Side(V, X)])
    c, k = V.shape[-1], basis.R.shape[-2]
    chosen = torch.eye(c + k, k, dtype=V.dtype, device=V.device).roll(c, 0)
    return basis.turned(chosen.expand(len(V), -1, -1))
