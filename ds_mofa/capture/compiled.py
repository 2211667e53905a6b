"""Sketching within ``torch.compile``: an operator, for a compiled backward computes all that it may be asked for."""

import weakref
from typing import Any

import torch
from torch import Tensor

from ds_mofa.capture.autograd import leaf_node, wanted

__all__ = ["add_linear", "key_of"]

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


@torch.library.custom_op("ds_mofa::add_linear", mutates_args=("key",))
def add_linear(x: Tensor, dy: Tensor, key: Tensor) -> None:
    """``add_linear`` of the :class:`ds_mofa.capture.sketch.Sketch` with this key. Whether the running backward is asked for
    the weight's gradient is known only when it runs.

    That the key changes is a pretence, which keeps the call where it is and what it is. The sketch itself is not handed to
    the graph: it is a view into a buffer, of which Inductor makes copies, and in torch 2.11 wrong ones.
    """
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
            return
    sketch.open()
    # Compiled autograd writes .grad once more, as it was when it was traced, after all has run.
    sketch.unmarked = sketch.grad is not None and torch._dynamo.compiled_autograd.in_compiled_autograd_region
    sketch.add_linear_now(x, dy)
