"""One budget of ranks, shared out among all matrices."""

import math

import torch
from torch import Tensor

__all__ = ["allotted_ranks"]


def allotted_ranks(values: list[Tensor], costs: list[int], rank: int) -> list[Tensor]:
    """Ranks (B,) for batches of matrices, rank / 2 at least, within what ``rank`` for each would cost in all.

    Args:
        values: (B, cap) of each batch, what each direction is worth, falling.
        costs: of one direction of a matrix of each batch.
        rank: the mean.
    """
    least = max(1, rank // 2)
    worth, price, owner = [], [], []
    budget, matrices = 0, 0
    for value, cost in zip(values, costs):
        count, cap = value.shape
        first = torch.arange(cap, device=value.device) < least
        worth.append(torch.where(first, math.inf, value / cost).flatten())
        price.append(torch.full((count * cap,), float(cost), device=value.device, dtype=torch.float64))
        owner.append(matrices + torch.arange(count, device=value.device).repeat_interleave(cap))
        budget, matrices = budget + rank * cost * count, matrices + count
    worth, price, owner = torch.cat(worth), torch.cat(price), torch.cat(owner)
    order = worth.argsort(descending=True, stable=True)
    taken = (price[order].cumsum(0) <= budget).to(torch.int64)
    ranks = torch.zeros(matrices, dtype=torch.int64, device=worth.device).index_add_(0, owner[order], taken)
    return list(ranks.split([len(value) for value in values]))
