"""What is alive after the backward of each layer: the proof that no full-rank gradient is kept.

A weight gradient that lives would have been allocated in this backward and still be there when its layer is done. So
for each layer: everything that this backward has allocated and not freed, but for the gradient that the layer passes on
to the one before it and the output gradients that wait for their sketches; the largest piece by size and stack; and
what the ``.grad`` of the layers' matrices hold.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_mofa.parameters import full_shape
from ds_mofa.profiler.measure.curve import Span, alive, new_gradients
from ds_mofa.profiler.measure.fully_sharded import parameters
from ds_mofa.profiler.measure.inventory import leaves
from ds_mofa.profiler.storages import Allocation

__all__ = ["LayerMark", "find_layers", "watch_layers", "matrix_gradients", "after_each_layer", "verdict"]


class LayerMark(NamedTuple):
    """The end of one layer's backward.

    Attributes:
        layer: its name.
        moment: nanoseconds since the epoch.
        passed_on: address of the gradient of the layer's input.
        held: bytes of the ``.grad`` of all layers' matrices.
    """

    layer: str
    moment: int
    passed_on: int
    held: int


def find_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a model, by name: the entries of its longest ``nn.ModuleList``, or none."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    name, longest = max(lists, key=lambda item: len(item[1]))
    return [(f"{name}.{i}" if name else str(i), layer) for i, layer in enumerate(longest)]


def watch_layers(
    model: nn.Module, done: Callable[[str, Tensor], None], wanted: Callable[[], bool]
) -> list[Callable[[], None]]:
    """Call ``done(name, input gradient)`` at the end of each layer's backward, for forwards in which it is ``wanted``;
    returns what undoes it.
    """

    def hook_for(name: str):
        def before(module, args, kwargs):
            tensor = args[0] if args else kwargs.get("hidden_states")
            if wanted() and isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
                tensor.register_hook(lambda grad: done(name, grad))

        return before

    handles = [layer.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, layer in find_layers(model)]
    return [handle.remove for handle in handles]


def matrix_gradients(model: nn.Module) -> int:
    """Bytes of the ``.grad`` of all matrices in the model's layers."""
    grads = [p.grad for _, layer in find_layers(model) for p in parameters(layer) if len(full_shape(p)) == 2]
    return sum(grad.nbytes for grad in leaves(grads))  # not of its storage, which may be a bucket


def after_each_layer(
    allocations: Sequence[Allocation], marks: Sequence[LayerMark], spans: Sequence[Span], model: nn.Module
) -> list[dict[str, Any]]:
    """One entry for each layer, of the backward in which most was alive. Sizes in bytes."""
    gradients = {
        name: [
            full_shape(p)[0] * full_shape(p)[1] * p.element_size()
            for p in parameters(layer)
            if p.requires_grad and len(full_shape(p)) == 2
        ]
        for name, layer in find_layers(model)
    }
    backwards = [span for span in spans if span.name == "backward"]
    worst: dict[str, dict[str, Any]] = {}
    for mark in marks:
        span = next((span for span in backwards if span.start <= mark.moment <= span.end), None)
        if span is None:
            continue
        kept = new_gradients(allocations, span.start, mark.moment)
        passed_on = sum(one.size for one in kept if one.address == mark.passed_on)
        kept = [one for one in kept if one.address != mark.passed_on]
        there = [one for one in alive(allocations, mark.moment) if one.born >= span.start and one.owner]
        waiting = sum(one.size for one in there if one.category == "workspace")
        total = sum(one.size for one in kept)
        if mark.layer in worst and worst[mark.layer]["kept"] + worst[mark.layer]["held"] >= total + mark.held:
            continue
        sizes = gradients.get(mark.layer, [])
        worst[mark.layer] = {
            "layer": mark.layer,
            "kept": total,
            "held": mark.held,
            "passed_on": passed_on,
            "waiting": waiting,
            "pieces": len(kept),
            "largest": kept[0].size if kept else 0,
            "stack": list(kept[0].stack[:12]) if kept else [],
            "layer_gradients": sum(sizes),
            "smallest_gradient": min(sizes, default=0),
        }
    if worst:  # one stack is enough, of the largest piece
        largest = max(worst.values(), key=lambda entry: entry["largest"])
        for entry in worst.values():
            entry["stack"] = entry["stack"] if entry is largest else []
    return sorted(worst.values(), key=lambda e: [int(part) if part.isdigit() else 0 for part in e["layer"].split(".")])


def verdict(entries: Sequence[dict[str, Any]]) -> tuple[bool, str]:
    """Whether no full-rank gradient lives, and the sentence that says why.

    It holds where no ``.grad`` of a layer's matrix is there when a layer is done, and no piece that backward has left
    is as large as the smallest weight gradient of the layer.
    """
    measured = [entry for entry in entries if entry["layer_gradients"]]
    if not measured:
        return False, "not shown: no layer with trained matrices was seen in backward"
    held = max(entry["held"] for entry in measured)
    piece = max(measured, key=lambda entry: entry["largest"])
    total = max(measured, key=lambda entry: entry["kept"])
    smallest = min(entry["smallest_gradient"] for entry in measured)
    waiting = max(entry["waiting"] for entry in measured)
    waits = f" (and {waiting / 1e6:.1f} MB of output gradients that wait for their sketches)" if waiting else ""
    text = (
        f"after the backward of each of {len(measured)} layers the matrices' .grad hold {held / 1e6:.2f} MB; of what "
        f"that backward allocated, the gradient it passes on apart{waits}, {total['kept'] / 1e6:.3f} MB or less are "
        f"alive, the largest piece {piece['largest'] / 1e6:.3f} MB ({piece['layer']}); the smallest weight gradient "
        f"would be {smallest / 1e6:.3f} MB, all of a layer {total['layer_gradients'] / 1e6:.2f} MB"
    )
    return held == 0 and piece["largest"] < smallest, text
