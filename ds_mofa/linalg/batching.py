"""Small matrices of several batches, worked on as one: on a GPU what counts is how often one calls."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

__all__ = ["together"]


def together(
    batches: Sequence[Tensor],
    work: Callable[..., tuple[Tensor, ...]],
    settings: Sequence[Hashable] | None = None,
) -> list[tuple[Tensor, ...]]:
    """``work`` on each batch (B, p, q), called once for all batches of one p, q and setting.

    Args:
        batches: each with its own B.
        work: from (sum of B, p, q), and the setting if there are any, to tensors that all begin with that sum.
        settings: one for each batch.

    Returns:
        For each batch its part of what ``work`` has returned.
    """
    chosen = [(setting,) for setting in settings] if settings is not None else [()] * len(batches)
    kinds = [(batch.shape[-2:], setting) for batch, setting in zip(batches, chosen)]
    results: list[tuple[Tensor, ...]] = [()] * len(batches)
    for kind in dict.fromkeys(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        done = work(torch.cat([batches[i] for i in members]), *kind[1])
        parts = zip(*(tensor.split([len(batches[i]) for i in members]) for tensor in done))
        for i, part in zip(members, parts):
            results[i] = part
    return results
