"""Sketching within ``torch.compile``: an operator, for a compiled backward computes all that it may be asked for."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_mofa.capture.autograd import leaf_node, wanted
from ds_mofa.capture.queue import Queue

__all__ = ["add_grouped", "add_linear", "add_linears", "add_rows", "key_of"]

_sketches: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_last_key = 0


def key_of(sketch: Any) -> Tensor:
    """A number for the sketch, as a tensor: a compiled graph takes it as an input, where an int would be a constant of
    the graph, and every layer would be compiled for itself.
    """
    global _last_key
    _last_key += 1
    _sketches[_last_key] = sketch
    return torch.tensor(_last_key, dtype=torch.int64, device="cpu")


# Not torch.library.custom_op, whose Python around each call takes as long again as the call.
_library = torch.library.Library("ds_mofa", "FRAGMENT")
_library.define("add_linear(Tensor x, Tensor dy, Tensor(a!) key) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("add_linears(Tensor[] x, Tensor[] dy, Tensor(a!)[] keys) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "add_grouped(Tensor left, Tensor right, Tensor ends, Tensor? left_rows, Tensor? right_rows, Tensor(a!) key) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("add_rows(Tensor ids, Tensor dy, Tensor(a!) key) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def _add_linear(x: Tensor, dy: Tensor, key: Tensor) -> None:
    """``add_linear`` of the :class:`ds_mofa.capture.sketch.Sketch` with this key. Whether the running backward is asked for
    the weight's gradient is known only when it runs.

    That the key changes is a pretence, which keeps the call where it is and what it is. The sketch itself is not handed to
    the graph: it is a view into a buffer, of which Inductor makes copies, and in torch 2.11 wrong ones.
    """
    _add_linears((x,), (dy,), (key,))


def _add_linears(x: Sequence[Tensor], dy: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    """Likewise of several, as :mod:`ds_mofa.capture.together` joins them: those that one queue serves in one launch."""
    together: dict[Queue, list[tuple]] = {}
    for one_x, one_dy, key in zip(x, dy, keys, strict=True):
        sketch = _opened(key)
        if sketch is None:
            continue
        queue = sketch.queue_of(one_x, one_dy)
        if queue is None:
            sketch.add_products(one_x, one_dy)
        else:
            together.setdefault(queue, []).append((sketch.addresses, one_x.contiguous(), one_dy.contiguous()))
    for queue, work in together.items():
        queue.take(work)


def _add_rows(ids: Tensor, dy: Tensor, key: Tensor) -> None:
    """Likewise ``add_rows``."""
    sketch = _opened(key)
    if sketch is not None:
        sketch.add_rows(ids, dy)


def _add_grouped(
    left: Tensor, right: Tensor, ends: Tensor, left_rows: Tensor | None, right_rows: Tensor | None, key: Tensor
) -> None:
    """Likewise ``add_grouped``."""
    sketch = _opened(key)
    if sketch is not None:
        sketch.add_grouped(left, right, ends, left_rows, right_rows)


def _opened(key: Tensor) -> Any:
    """The sketch, ready to be added to; None where the running backward is not asked for the weight's gradient."""
    sketch = _sketches[int(key)]
    leaf = sketch.param
    if leaf is not None and sketch.leaf is not None:
        leaf = sketch.leaf(leaf)
    if leaf is not None:
        answer = wanted(leaf_node(leaf))
        if answer is None:
            raise RuntimeError(
                "autograd.grad asks for the gradient of a matrix through a compiled forward, which has sketches of it "
                "alone: call the model without torch.compile there"
            )
        if not answer:
            return None
    sketch.open()
    # Compiled autograd writes .grad once more, as it was when it was traced, after all has run.
    sketch.unmarked = sketch.grad is not None and torch._dynamo.compiled_autograd.in_compiled_autograd_region
    return sketch


_FUNCTIONS = {
    "add_linear": _add_linear,
    "add_linears": _add_linears,
    "add_rows": _add_rows,
    "add_grouped": _add_grouped,
}
for _name, _function in _FUNCTIONS.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ds_mofa::{_name}", lambda *args: None, lib=_library)
add_linear = torch.ops.ds_mofa.add_linear.default
add_linears = torch.ops.ds_mofa.add_linears.default
add_grouped = torch.ops.ds_mofa.add_grouped.default
add_rows = torch.ops.ds_mofa.add_rows.default
