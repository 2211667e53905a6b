"""What a step says of each matrix, in numbers that a user can act on.

kept_energy: share of the square norm of momentum plus gradient that rank r keeps. Below 0.8, raise the rank.
effective_rank: how many directions carry the momentum, 1 to r. Near r, raise the rank; near 1, lower it.
orthogonality_error: largest element of U^T U - I and V^T V - I. Above 1e-4 it is a fault: please report it.
projected_grad_norm: of the gradient's part that the factors see. If it jumps, lower the learning rate, or clip. If it
    is zero, no gradient came, and the matrix has stayed as it was.
momentum_norm: of the momentum. If it is zero, no gradient has reached this matrix so far.

A stack of matrices is measured as one: means over those that had a gradient, the worst error, whole norms.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_mofa.linalg.factors import projected_norm

__all__ = ["MEASURES", "Report", "by_parameter", "measure"]

MEASURES = ("kept_energy", "effective_rank", "orthogonality_error", "projected_grad_norm", "momentum_norm")


class Report(NamedTuple):
    """The measures of one optimizer step.

    Attributes:
        step: which, counted from 1.
        skipped: optimizer steps skipped so far.
        names: of the parameters.
        values: (parameters, measures), float64, on any device.
    """

    step: int
    skipped: int
    names: Sequence[str]
    values: Tensor

    def by_matrix(self) -> dict[str, dict[str, float]]:
        """{name of the parameter: {measure: value}}. Waits for the device."""
        return {name: dict(zip(MEASURES, row)) for name, row in zip(self.names, self.values.tolist())}

    def summary(self) -> dict[str, float]:
        """The measures over all matrices: means, the worst orthogonality error, whole norms. Waits for the device."""
        mean, most, whole = torch.stack([self.values.mean(0), self.values.amax(0), self.values.norm(dim=0)]).tolist()
        chosen = (mean[0], mean[1], most[2], whole[3], whole[4])
        return {**dict(zip(MEASURES, chosen)), "skipped_steps": float(self.skipped)}


def by_parameter(values: Tensor, stacks: Sequence[int | None]) -> Tensor:
    """The measures (parameters, 5) of those (matrices, 5) of their matrices.

    Args:
        stacks: matrices of each parameter; None where it is one, and no stack.
    """
    if not any(stacks):
        return values
    parts = values.split([1 if stack is None else stack for stack in stacks])
    return torch.stack([part[0] if stack is None else _of_stack(part) for part, stack in zip(parts, stacks)])


def _of_stack(values: Tensor) -> Tensor:
    came = (values[:, 3:4] > 0).double()
    came = torch.where(came.any(), came, 1)
    means = (values[:, :2] * came).sum(0) / came.sum()
    return torch.cat([means, values[:, 2].amax(0, keepdim=True), values[:, 3:].norm(dim=0)])


def measure(
    old_sigma: Tensor, left: Tensor, right: Tensor, new_sigma: Tensor, *, beta: float, gamma: float | Tensor
) -> Tensor:
    """The measures (B, 5), float64, of one update of a batch, from what the update has at hand.

    Args:
        old_sigma: (B, r), before it.
        left, right: its :func:`ds_mofa.linalg.factors.gram_matrices`, (B, 2 r, 2 r).
        new_sigma: (B, r), after it.
        beta, gamma: weights of the momentum and the gradient in it.
    """
    r = old_sigma.shape[-1]
    old, new = old_sigma.double().square(), new_sigma.double().square()
    gradient = projected_norm(left, right)
    # |beta M + gamma G_hat|^2: the inner product of M = U diag(sigma) V^T and G_hat is that of sigma and diag(U^T G V)
    inner = (old_sigma * left[..., :r, r:].diagonal(dim1=-2, dim2=-1)).sum(-1)
    whole = beta**2 * old.sum(-1) + gamma**2 * gradient + 2 * beta * gamma * inner
    kept = new.sum(-1)
    share = new / torch.where(kept > 0, kept, 1).unsqueeze(-1)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    identity = torch.eye(r, dtype=left.dtype, device=left.device)
    error = torch.stack([(gram[..., :r, :r] - identity).abs().amax((-2, -1)) for gram in (left, right)]).amax(0)
    share_kept = torch.where(whole > 0, kept / torch.where(whole > 0, whole, 1), 1).clamp_max(1)
    rank = torch.where(kept > 0, entropy.exp(), 0)
    return torch.stack([share_kept, rank, error, gradient.sqrt(), kept.sqrt()], dim=-1)
