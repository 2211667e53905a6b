"""Output heads: asked of the model where it has Hugging Face's method, and else told by shapes.

In a model of one's own nothing says which linear is a head. One is taken for a head where its outputs are as many as
an embedding has rows, and nothing in the model reads vectors of that length. Heads may be several, of any place in the
model, a little longer than the embedding (padded), or of another width (a factorised embedding).
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ds_mofa.parameters.kinds import Slot, is_embedding, is_linear_map
from ds_mofa.parameters.shapes import full_shape

__all__ = ["output_heads"]

_PADDING = 127  # most rows that a head has more than its embedding: vocabularies are padded to multiples of up to 128

Linears = dict[str, nn.Linear]


def output_heads(model: nn.Module, slots: dict[nn.Parameter, list[Slot]]) -> set[nn.Parameter]:
    """The 2-D weights of all output heads.

    Args:
        model: asked by ``get_output_embeddings()`` of each of its modules that has it.
        slots: where it holds its parameters.
    """
    asked: list[Any] = [
        module for module in model.modules() if callable(getattr(module, "get_output_embeddings", None))
    ]
    answers = [(module, module.get_output_embeddings()) for module in asked]
    heads = [head for _, head in answers if head is not None]
    # A module with the method has answered for what is in it, but not for a head that stands beside it. One that
    # names an embedding (FSMT) has said with what its head may be tied, and not which module that is.
    closed = {part for module, head in answers if not isinstance(head, nn.Embedding) for part in module.modules()}
    closed -= {part for module, head in answers if isinstance(head, nn.Embedding) for part in module.modules()}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    free = {name: module for name, module in linears.items() if module not in closed}
    heads += _by_shape(model, free, slots, [head for head in heads if isinstance(head, nn.Linear)])
    heads += _beside(model, heads)
    return {param for head in heads for param in _weights(head, slots)}


def _weights(head: Any, slots: dict[nn.Parameter, list[Slot]]) -> Iterable[nn.Parameter]:
    own = [p for p, held in slots.items() if len(full_shape(p)) == 2 and any(module is head for module, _ in held)]
    if own or not isinstance(head, nn.Module):
        return own
    weight = getattr(head, "weight", None)  # of a wrapper such as peft's
    return [weight] if isinstance(weight, nn.Parameter) else []


def _by_shape(
    model: nn.Module, free: Linears, slots: dict[nn.Parameter, list[Slot]], known: list[nn.Linear]
) -> list[nn.Linear]:
    two_d = {param: held for param, held in slots.items() if len(full_shape(param)) == 2}
    tables = {full_shape(param) for param, held in two_d.items() if is_embedding(held)}
    # A bare one may be a table for F.embedding; of these the whole shape must be a head's.
    bare = {full_shape(param) for param, held in two_d.items() if not is_linear_map(param, held)} - tables
    read = _widths(model) | {width for _, width in tables}
    rows = {rows for rows, _ in tables} | {head.out_features for head in known}

    outer: list[nn.Linear] = []
    inner: list[nn.Linear] = []
    for name, one in free.items():
        m, n = one.out_features, one.in_features
        if m in read:
            continue
        if m in rows or (m, n) in bare:
            (inner if _in_a_block(name) else outer).append(one)
        elif not _in_a_block(name) and any(n == width and 0 < m - r <= min(r, _PADDING) for r, width in tables):
            outer.append(one)
    # In a block it may be the fused projection of a width that happens to be a context's length.
    said = {head.out_features for head in (*outer, *known)}
    found = outer + [one for one in inner if one.out_features in said or not said]
    if found or known:
        return found
    last = list(free.values())[-1:]
    return [one for one in last if (one.out_features, one.in_features) in tables]


def _in_a_block(name: str) -> bool:
    """Whether a module is within an element of a list, and not one itself."""
    return any(part.isdigit() for part in name.split(".")[:-1])


def _widths(model: nn.Module) -> set[int]:
    """Lengths of the vectors that are read by a linear map or a norm."""
    widths = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            widths.add(module.in_features)
        elif "norm" in type(module).__name__.lower():
            widths |= {full_shape(p)[0] for p in module.parameters(recurse=False) if len(full_shape(p)) == 1}
    return widths


def _beside(model: nn.Module, heads: list[Any]) -> list[nn.Linear]:
    """Linears beside a head that are as wide as it has rows: more columns of it, stored the other way (MobileBERT)."""
    sizes = [(head, head.out_features) for head in heads if isinstance(head, nn.Linear)]
    found = []
    for parent in model.modules():
        children = [child for child in parent.children() if isinstance(child, nn.Linear)]
        for head, m in sizes:
            if any(child is head for child in children) and head.in_features != m:
                found += [child for child in children if child is not head and child.in_features == m]
    return found
