"""How the energy of a matrix, its squared Frobenius norm, is spread over its singular directions."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["captured", "directions_for", "energies", "noise_like"]


def energies(M: Tensor) -> Tensor:
    """The share of each direction, largest first: sigma^2 / |M|^2, (B, min(m, n)), float64.

    From the eigenvalues of the smaller Gram matrix, much faster than an SVD, and as exact as squares need it.
    """
    double = M.double()
    gram = double @ double.mT if M.shape[-2] <= M.shape[-1] else double.mT @ double
    shares = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)
    return shares / shares.sum(-1, keepdim=True)


def captured(shares: Tensor, directions: Sequence[int]) -> Tensor:
    """The share in the leading k directions for each k, (B, len(directions)); of all where there are fewer."""
    sums = shares.cumsum(-1)
    return torch.stack([sums[..., min(k, sums.shape[-1]) - 1] for k in directions], dim=-1)


def directions_for(shares: Tensor, share: float) -> Tensor:
    """How many directions hold this share, (B,)."""
    return (shares.cumsum(-1) < share).sum(-1) + 1


def noise_like(M: Tensor) -> Tensor:
    """White noise of the same shape: what a momentum without any structure looks like."""
    return torch.randn(M.shape, generator=torch.Generator().manual_seed(0)).to(M.device)
