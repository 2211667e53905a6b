"""The factors as a checkpoint has them, by the names of their matrices, and as a flat buffer has them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_mofa.factors import Factors, resized
from ds_mofa.parameters import Matrix
from ds_mofa.partition import Layout

__all__ = ["STATE_FORMAT", "packed", "unpack"]

STATE_FORMAT = 1


def packed(flat: Tensor, layout: Layout, matrices: Sequence[Matrix], *, steps: int, skipped: int) -> dict[str, Any]:
    """What a checkpoint holds: tensors in dicts, on ``flat``'s device.

    Args:
        flat: a whole flat buffer of factors.
        steps, skipped: how many optimizer steps there were, and how many have been left out.
    """
    named = {}
    for matrix in matrices:
        U, V, sigma = layout.views(flat, matrix.index)
        named[matrix.name] = {"U": U.clone(), "sigma": sigma.clone(), "V": V.clone()}
    counters = {"format": STATE_FORMAT, "steps": steps, "skipped": skipped}
    return {**{key: torch.tensor(value) for key, value in counters.items()}, "matrices": named}


def unpack(
    state: Mapping[str, Any], layout: Layout, matrices: Sequence[Matrix], rank: int, flat: Tensor, counters: Tensor
) -> str | None:
    """Fill ``flat`` and ``counters`` (steps and skipped) from what :func:`packed` has given, maybe at another rank.

    Returns:
        The reason when it does not fit; else None.
    """
    if int(state.get("format", -1)) != STATE_FORMAT:
        return (
            f"the checkpoint holds MoFaSGD state of format {state.get('format', 'none')}, this version reads "
            f"{STATE_FORMAT}. Load it with the version that wrote it, or start the optimizer anew "
            "(load_optimizer_states=False)"
        )
    saved = state["matrices"]
    names = {matrix.name for matrix in matrices}
    if saved.keys() != names:
        odd = sorted(saved.keys() ^ names)
        return (
            f"the checkpoint's matrices are not this model's: {len(odd)} are on one side only, such as {odd[0]!r}. "
            "Use the include and exclude that it was saved with, and a rank that fits the same matrices"
        )
    sizes, kept = set(), torch.zeros(2, dtype=torch.float64)  # squares of sigma: after and before
    for matrix in matrices:
        one = Factors(*(saved[matrix.name][key] for key in Factors._fields))
        (m, n), r = matrix.shape, one.sigma.shape[-1]
        for key, value, shape in zip(one._fields, one, ((m, r), (r,), (n, r))):
            if value.shape != shape:
                return (
                    f"the checkpoint's {key} of {matrix.name!r} is {tuple(value.shape)}, this model's would be "
                    f"{shape}. Use the model that it was saved with"
                )
        sizes.add(r)
        if state["steps"] > 0:  # before, there are no factors yet
            new = resized(one, rank)
            for view, value in zip(layout.views(flat, matrix.index), (new.U, new.V, new.sigma)):
                view.copy_(value)
            kept += torch.stack([new.sigma.double().square().sum(), one.sigma.double().square().sum()])
    if state["steps"] > 0 and sizes != {rank}:
        print(_resize_line(sizes, rank, kept), flush=True)
    counters.copy_(torch.stack([state["steps"], state["skipped"]]))
    return None


def _resize_line(sizes: set[int], rank: int, kept: Tensor) -> str:
    """What changing the rank of loaded factors does to the momentum; ``kept``: its squared norm after and before."""
    saved = ", ".join(map(str, sorted(sizes)))
    if max(sizes) < rank:
        effect = "grown by directions without momentum, which the next gradients fill"
    else:
        effect = f"truncated to the leading ones, which hold {float(kept[0] / kept[1].clamp_min(1e-300)):.4%} of the "
        effect += "momentum's squared norm"
    return f"ds_mofa: the checkpoint's factors have rank {saved}, this run's {rank}: {effect}"
