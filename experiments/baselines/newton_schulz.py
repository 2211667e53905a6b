"""Muon's orthogonalisation: the quintic Newton-Schulz iteration with the coefficients of its author.

https://kellerjordan.github.io/posts/muon/: from X = M / |M|, five times

    X <- a X + (b X X^T + c (X X^T)^2) X,      a, b, c = 3.4445, -4.7750, 2.0315

acts on each singular value alone and takes those above 0.01 to between 0.7 and 1.2: nearly U V^T. Unlike
``torch.optim.Muon``, which iterates in bfloat16, it runs in the precision of M.
"""

import torch
from torch import Tensor

__all__ = ["orthogonalized"]

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalized(M: Tensor, steps: int = 5) -> Tensor:
    """Nearly U V^T of M (k, l) = U S V^T, k <= l; zero for zero."""
    X = M / torch.linalg.matrix_norm(M).clamp_min(torch.finfo(M.dtype).tiny)
    for _ in range(steps):
        gram = X @ X.mT
        X = _A * X + (_B * gram + _C * gram @ gram) @ X
    return X
