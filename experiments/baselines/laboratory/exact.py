"""In each step the matrices whose turn it is move by all directions of their gradient, and by nothing else."""

from typing import Any

import torch

from experiments.baselines.laboratory.batch import Batch, Terms

__all__ = ["exact_steps"]


def exact_steps(batches: list[Batch], moves: list[Terms], s: dict[str, Any]) -> list[Terms]:
    """``moves`` with those of every ``exact``-th matrix, another set in each step, replaced by the polar factor of G.

    A batch in which some take their turn is padded to full rank with zero coefficients.
    """
    every = s["exact"]
    return [
        _replaced(batch, move, turn)
        if any(turn := [(index + batch.t) % every == 0 for index in batch.indices])
        else move
        for batch, move in zip(batches, moves)
    ]


def _replaced(batch: Batch, move: Terms, turn: list[bool]) -> Terms:
    P, sigma, Qt = torch.linalg.svd(batch.G.double(), full_matrices=False)
    whole = Terms(P.to(batch.G), (sigma > 1e-7 * sigma[..., :1]).to(batch.G), Qt.mT.to(batch.G))
    chosen = torch.tensor(turn, device=batch.G.device).view(-1, 1)
    # Both side by side, one of them with zero coefficients.
    return Terms(
        torch.cat([move.U, whole.U], dim=-1),
        torch.cat([move.coefficients * ~chosen, whole.coefficients * chosen], dim=-1),
        torch.cat([move.V, whole.V], dim=-1),
    )
