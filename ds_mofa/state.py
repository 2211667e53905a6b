"""The owners' state as a checkpoint has it, by the names of the matrices, and as a flat buffer has it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_mofa.parameters import Matrix
from ds_mofa.partition import Layout
from ds_mofa.rules.rule import Rule

__all__ = ["STATE_FORMAT", "packed", "unpack"]

STATE_FORMAT = 1
_UNNAMED = "MoFaSGD"  # the states of which name no rule


def packed(
    flat: Tensor, layout: Layout, matrices: Sequence[Matrix], rule: Rule, *, steps: int, skipped: int
) -> dict[str, Any]:
    """What a checkpoint holds: tensors in dicts, on ``flat``'s device.

    Args:
        flat: the whole state, in ``layout``.
        steps, skipped: how many optimizer steps there were, and how many have been left out.
    """
    named = {}
    for matrix in matrices:
        views = layout.views(flat, matrix.index)
        named[matrix.name] = {key: view.clone() for key, view in zip(rule.fields, views, strict=True)}
    named_rule = {} if rule.name == _UNNAMED else {"rule": rule.name}
    counters = {"format": STATE_FORMAT, "steps": steps, "skipped": skipped}
    numbers = {key: torch.tensor(value, device="cpu") for key, value in counters.items()}
    return {**named_rule, **numbers, "matrices": named}


def unpack(
    state: Mapping[str, Any], layout: Layout, matrices: Sequence[Matrix], rule: Rule, flat: Tensor, counters: Tensor
) -> str | None:
    """Fill ``flat`` and ``counters`` (steps and skipped) from what :func:`packed` has given, maybe at another rank.

    Returns:
        The reason when it does not fit; else None.
    """
    if int(state.get("format", -1)) != STATE_FORMAT:
        return (
            f"the checkpoint holds {rule.name} state of format {state.get('format', 'none')}, this version reads "
            f"{STATE_FORMAT}. Load it with the version that wrote it, or start the optimizer anew "
            "(load_optimizer_states=False)"
        )
    wrote = state.get("rule", _UNNAMED)
    if wrote != rule.name:
        return (
            f"the checkpoint was saved by {wrote}, this run's optimizer is {rule.name}, which can make nothing of its "
            f"state. Use {wrote}, or load the weights alone (load_optimizer_states=False)"
        )
    saved = state["matrices"]
    names = {matrix.name for matrix in matrices}
    if saved.keys() != names:
        odd = sorted(saved.keys() ^ names)
        return (
            f"the checkpoint's matrices are not this model's: {len(odd)} are on one side only, such as {odd[0]!r}. "
            "Use the include and exclude that it was saved with, and a rank that fits the same matrices"
        )
    ones, ranks = [], set()
    for matrix in matrices:
        given = rule.completed(saved[matrix.name], int(state["steps"]))
        one = tuple(given[key] for key in rule.fields)
        r = one[-1].shape[-1]
        for key, value, shape in zip(rule.fields, one, rule.tensors(*matrix.shape, r)):
            if value.shape != shape:
                return (
                    f"the checkpoint's {key} of {matrix.name!r} is {tuple(value.shape)}, this model's would be "
                    f"{shape}. Use the model that it was saved with"
                )
        ones.append(one)
        ranks.add(r)
    if state["steps"] > 0:  # before, there is no state yet
        if ranks != {rule.rank}:
            try:
                ones, line = rule.resized(ones, ranks)
            except ValueError as error:
                return str(error)
            print(f"ds_mofa: {line}", flush=True)
        for matrix, one in zip(matrices, ones, strict=True):
            for view, value in zip(layout.views(flat, matrix.index), one, strict=True):
                view.copy_(value)
    counters.copy_(torch.stack([state["steps"], state["skipped"]]))
    return None
