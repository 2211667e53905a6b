"""Small matrices of several batches, worked on as one: on a GPU what counts is how often one calls."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

__all__ = ["together"]


def together(
    batches: Sequence[Tensor | tuple[Tensor, ...]],
    work: Callable[..., tuple[Tensor, ...]],
    settings: Sequence[Hashable] | None = None,
) -> list[tuple[Tensor, ...]]:
    """``work`` on each batch, called once for all batches of the same shapes and setting.

    Args:
        batches: a tensor (B, ...), or several of one B; each batch with its own B.
        work: from those tensors, of the sum of B, and the setting if there are any, to tensors that all begin with that sum.
        settings: one for each batch.

    Returns:
        For each batch its part of what ``work`` has returned.
    """
    given = [(batch,) if isinstance(batch, Tensor) else batch for batch in batches]
    chosen = [(setting,) for setting in settings] if settings is not None else [()] * len(batches)
    kinds = [(*[tensor.shape[1:] for tensor in tensors], setting) for tensors, setting in zip(given, chosen)]
    results: list[tuple[Tensor, ...]] = [()] * len(batches)
    for kind in dict.fromkeys(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        done = work(*map(torch.cat, zip(*(given[i] for i in members))), *kind[-1])
        parts = zip(*(tensor.split([len(given[i][0]) for i in members]) for tensor in done))
        for i, part in zip(members, parts):
            results[i] = part
    return results
