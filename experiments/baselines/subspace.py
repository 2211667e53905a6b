"""The subspace that one-sided methods project on: the leading left singular vectors of a gradient."""

import torch
from torch import Tensor

__all__ = ["leading_subspace"]


def leading_subspace(G: Tensor, rank: int) -> Tensor:
    """P (s, r), orthonormal: the ``rank`` leading left singular vectors of G (s, l), by a whole SVD.

    The SVD leaves each vector's sign open, and moments that outlive a refresh feel it: the entry of largest magnitude
    is made positive, so that machines agree.
    """
    P = torch.linalg.svd(G, full_matrices=False).U[:, :rank]
    largest = P.gather(0, P.abs().argmax(dim=0, keepdim=True))
    return P * torch.where(largest < 0, -1.0, 1.0)
