"""The owners' state as a checkpoint has it, by the names of the matrices, and as a flat buffer has it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_mofa.parameters import Matrix
from ds_mofa.partition.layout import Layout
from ds_mofa.rules.rule import Rule

__all__ = ["STATE_FORMAT", "WAY_OUT", "adamw_misfit", "assembled", "misfit", "packed", "unpack", "whole_misfit"]

STATE_FORMAT = 1
_BARE = (
    "A 2-D parameter of no known linear map, which earlier versions took for a matrix, is one where include names it"
)
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
        views = layout.views(flat, matrix.index)  # of a stack (E, ...)
        named[matrix.name] = {key: view.clone() for key, view in zip(rule.field_names(), views, strict=True)}
    return assembled(rule.name, named, steps=steps, skipped=skipped)


def assembled(name: str, named: Mapping[str, Any], *, steps: int, skipped: int) -> dict[str, Any]:
    """The form of a state, around that of each matrix.

    Args:
        name: of the rule.
        named: the tensors of each matrix by their names, by the name of the matrix.
    """
    named_rule = {} if name == _UNNAMED else {"rule": name}
    counters = {"format": STATE_FORMAT, "steps": steps, "skipped": skipped}
    numbers = {key: torch.tensor(value, device="cpu") for key, value in counters.items()}
    return {**named_rule, **numbers, "matrices": dict(named)}


def unpack(
    state: Mapping[str, Any], layout: Layout, matrices: Sequence[Matrix], rule: Rule, flat: Tensor, counters: Tensor
) -> str | None:
    """Fill ``flat`` and ``counters`` (steps and skipped) from what :func:`packed` has given, maybe at another rank.

    Returns:
        The reason when it does not fit; else None. One process looks while the others wait to be told, so a state that
        is not one at all is a reason too, and no exception.
    """
    problem = misfit(state, matrices, rule)
    if problem:
        return problem
    saved = _completed(state, matrices, rule)
    ones = [tuple(saved[matrix.name][key] for key in rule.field_names()) for matrix in matrices]
    ranks = {one[-1].shape[-1] for one in ones}
    if state["steps"] > 0:  # before, there is no state yet
        if ranks != {rule.r}:
            try:
                ones, line = rule.resized(ones, ranks)
            except ValueError as error:
                return str(error)
            print(f"ds_mofa: {line}", flush=True)
        for matrix, one in zip(matrices, ones, strict=True):
            for view, value in zip(layout.views(flat, matrix.index), one, strict=True):
                view.copy_(value)
    counters.copy_(torch.stack([torch.as_tensor(state[key], device="cpu") for key in ("steps", "skipped")]))
    return None


def misfit(state: Any, matrices: Sequence[Matrix], rule: Rule) -> str | None:
    """Why a state is not one of these matrices and this rule, of any rank; None where it is."""
    problem = _not_a_state(state, rule) or _other_matrices(state["matrices"], matrices)
    if problem:
        return problem
    saved = _completed(state, matrices, rule)
    problems = (_not_the_tensors(saved[matrix.name], matrix, rule) for matrix in matrices)
    return next(filter(None, problems), None)


def whole_misfit(state: Any, title: str) -> str | None:
    """Why a state is not one of :meth:`ds_mofa.optimizers.base.MatrixOptimizer.state_dict`, of an optimizer of this title; None
    where it is.
    """
    keys = {"mofasgd", "masters", "matrix_groups", "adamw"}
    if isinstance(state, Mapping) and keys <= state.keys():
        return None
    kind = "AdamW or another optimizer of torch.optim" if isinstance(state, Mapping) and "state" in state else "none"
    lacking = sorted(keys - state.keys() if isinstance(state, Mapping) else keys)
    return f"this is no state of {title} but of {kind}: it lacks {', '.join(map(repr, lacking))}. {WAY_OUT}"


def adamw_misfit(saved: Mapping[str, Any] | None, groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Why AdamW's state is not one for these param groups; None where it is."""
    sizes, here = (
        [len(group["params"]) for group in some] for some in (saved["param_groups"] if saved else [], groups)
    )
    if sizes == here:
        return None
    return (
        f"AdamW's param groups in the checkpoint have {sizes} parameters, in this run {here}: use the model, include, "
        f"exclude and param groups that it was saved with. {_BARE}"
    )


WAY_OUT = "Use another checkpoint, or load the weights alone (load_optimizer_states=False)"


def _not_a_state(state: Any, rule: Rule) -> str | None:
    if not isinstance(state, Mapping):
        return f"what should be the {rule.name} state is a {type(state).__name__}. {WAY_OUT}"
    if state.keys() == {"state", "param_groups"}:
        return (
            "the state is one of a torch.optim optimizer such as AdamW, of which this run's optimizer, "
            f"{rule.name}, can make nothing. {WAY_OUT}"
        )
    if not _is_count(state.get("format")) or int(state["format"]) != STATE_FORMAT:
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
    for key in ("steps", "skipped"):
        if not _is_count(state.get(key)):
            return f"the {rule.name} state lacks its number of {key}. {WAY_OUT}"
    if not isinstance(state.get("matrices"), Mapping):
        return f"the {rule.name} state lacks its matrices. {WAY_OUT}"
    return None


def _completed(state: Mapping[str, Any], matrices: Sequence[Matrix], rule: Rule) -> dict[str, Any]:
    """The matrices' states by name, with what those of an earlier version lack."""
    found, steps = state["matrices"], int(state["steps"])
    return {
        matrix.name: rule.completed(found[matrix.name], steps) if isinstance(found[matrix.name], Mapping) else None
        for matrix in matrices
    }


def _other_matrices(saved: Mapping[str, Any], matrices: Sequence[Matrix]) -> str | None:
    odd = sorted(map(str, saved.keys() ^ {matrix.name for matrix in matrices}))
    if not odd:
        return None
    return (
        f"the checkpoint's matrices are not this model's: {len(odd)} are on one side only, such as {odd[0]!r}. "
        f"Use the include and exclude that it was saved with, and a rank that fits the same matrices. {_BARE}"
    )


def _not_the_tensors(saved: Any, matrix: Matrix, rule: Rule) -> str | None:
    """Why these are not a matrix's tensors, of any rank."""
    lacking = [
        key for key in rule.field_names() if not isinstance(saved, Mapping) or not isinstance(saved.get(key), Tensor)
    ]
    if lacking:
        return f"the checkpoint has no tensor {lacking[0]} of {matrix.name!r}. {WAY_OUT}"
    one = [saved[key] for key in rule.field_names()]
    r = one[-1].shape[-1] if one[-1].dim() else 0
    stack = () if matrix.stack is None else (matrix.stack,)
    for key, value, own in zip(rule.field_names(), one, rule.field_shapes(*matrix.shape, r), strict=True):
        shape = (*stack, *own)
        if tuple(value.shape) != shape:
            return (
                f"the checkpoint's {key} of {matrix.name!r} is {tuple(value.shape)}, this model's would be "
                f"{shape}. Use the model that it was saved with"
            )
        if value.dtype not in (torch.float32, torch.float64):
            kind = f"of {value.dtype}, and none that was saved is"
            return f"the checkpoint's {key} of {matrix.name!r} is {kind}. {WAY_OUT}"
        if not bool(torch.isfinite(value).all()):
            return f"the checkpoint's {key} of {matrix.name!r} holds a NaN or Inf. {WAY_OUT}"
    return None


def _is_count(value: Any) -> bool:
    whole = isinstance(value, int) or isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point()
    return whole and int(value) >= 0
