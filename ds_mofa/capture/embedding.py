"""The capture of ``nn.Embedding``: the gradient has one row a token, and is zero in all others. With the ids i_t and the
output's gradients dy_t,

    Y[i_t] += dy_t V      Z += sum_t dy_t^T U[i_t]

so that backward keeps the ids, and no m x n tensor is made. A head that is tied to the embedding adds to the same sketches.

Subclasses that call ``super().forward``, as the scaled embeddings of Gemma and mBART, are served in that call. What else a
subclass does with its weight goes the way of every gradient, as does what :mod:`ds_mofa.capture.linear` leaves to it.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_mofa.capture import compiled
from ds_mofa.capture.autograd import wanted
from ds_mofa.capture.held import holds, leaf_in, own_weight, refuse_replaced, replace_forward
from ds_mofa.capture.sink import Gathered, Sink
from ds_mofa.capture.sketch import Sketch
from ds_mofa.parameters import Matrix

__all__ = ["EmbeddingCapture", "SketchedEmbedding"]


class SketchedEmbedding(torch.autograd.Function):
    """weight[ids] whose backward sketches the weight gradient and does not compute it."""

    @staticmethod
    def forward(
        ctx, weight: Tensor, ids: Tensor, padding_idx: int, by_freq: bool, sparse: bool, sketch: Sink
    ) -> Tensor:
        """
        Args:
            weight: (m, n).
            ids: (...).
            padding_idx: the row that has no gradient; -1 for none.
            by_freq: whether a row's gradient is divided by the number of times that its id is in ``ids``.
            sparse: whether a gradient that is asked for is sparse.
            sketch: takes the place of the gradient.

        Returns:
            (..., n).
        """
        ctx.save_for_backward(ids)  # and not the weight, which ZeRO-3 and FSDP2 release
        ctx.rows, ctx.sketch = len(weight), sketch
        ctx.padding_idx, ctx.by_freq, ctx.sparse = padding_idx, by_freq, sparse
        return torch.embedding(weight, ids)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy: Tensor):
    (ids,) = ctx.saved_tensors
    sketch, dw = ctx.sketch, None
    if torch.compiler.is_compiling():
        dy = _counted(ctx, ids, dy)
        if type(sketch) is Sketch:
            compiled.add_rows(ids, dy, sketch.key)
        else:
            sketch.add_rows(ids, dy)
    else:
        asked = wanted(ctx.next_functions[0][0])
        if asked is None or asked and sketch.param is not None and sketch.param._backward_hooks:
            dw = torch.ops.aten.embedding_backward(dy, ids, ctx.rows, ctx.padding_idx, ctx.by_freq, ctx.sparse)
        elif asked:
            sketch.add_rows(ids, _counted(ctx, ids, dy))
    return dw, None, None, None, None, None


_backward_once = once_differentiable(_backward)


def _counted(ctx, ids: Tensor, dy: Tensor) -> Tensor:
    """dy as its rows count in the gradient: over the frequency of their ids, and not at all where these are padding."""
    if ctx.by_freq:
        flat = ids.reshape(-1)
        counts = torch.zeros(ctx.rows, dtype=flat.dtype, device=flat.device).index_add_(0, flat, torch.ones_like(flat))
        dy = dy / counts[ids].unsqueeze(-1)
    if ctx.padding_idx >= 0:
        dy = torch.where((ids == ctx.padding_idx).unsqueeze(-1), 0, dy)  # what there is may be NaN
    return dy


class EmbeddingCapture:
    """Replaces the ``forward`` of each ``nn.Embedding``, or that which a subclass calls by ``super()``."""

    def serves(self, module: nn.Module, matrix: Matrix) -> bool:
        return isinstance(module, nn.Embedding) and holds(module, matrix)

    def attach(self, module: nn.Module, matrix: Matrix, sink: Sink, gathered: Gathered | None) -> Callable[[], None]:
        """See :class:`ds_mofa.capture.sink.Capture`. ``gathered`` is not needed: backward has no use for the weight."""
        refuse_replaced(module, type(module).forward)
        plain = type(module).forward is nn.Embedding.forward
        sink.leaf = leaf_in(module)
        return replace_forward(module, _whole_forward(module, sink) if plain else _inner_forward(module, sink))


def _whole_forward(module: nn.Module, sink: Sink) -> Callable[..., Tensor]:
    """In the place of ``nn.Embedding.forward``."""
    embed = _embed(sink)

    def forward(self: Any, input: Tensor) -> Tensor:
        return embed(self, input) if self is module else nn.Embedding.forward(self, input)

    return forward


def _inner_forward(module: nn.Module, sink: Sink) -> Callable[..., Tensor]:
    """A subclass's forward, in which that of ``nn.Embedding`` is replaced.

    Its methods run on a double of the module, of the same attributes and of a class of which ``super().forward`` is another.
    The module itself keeps its class, by which others know it.
    """
    forward_of_class = type(module).forward
    last = type("Embedding", (nn.Embedding,), {"forward": _embed(sink)})
    double: Any = object.__new__(types.new_class(type(module).__name__, (type(module), last)))
    object.__setattr__(double, "__dict__", module.__dict__)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        # torch.compile follows the class's own forward, and the gradient goes by the hook.
        replaced = self is module and not torch.compiler.is_compiling()
        return forward_of_class(double if replaced else self, *args, **kwargs)

    return forward


def _embed(sink: Sink) -> Callable[[Any, Tensor], Tensor]:
    """``nn.Embedding.forward`` of the module that holds the sink's parameter, for a backward that sketches."""
    is_own = own_weight(sink.param)

    def forward(self: Any, input: Tensor) -> Tensor:
        weight = self.weight
        if not is_own(self, weight) or not torch.is_grad_enabled() or not weight.requires_grad:
            return nn.Embedding.forward(self, input)
        if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
            return nn.Embedding.forward(self, input)
        padding = -1 if self.padding_idx is None else self.padding_idx
        return SketchedEmbedding.apply(weight, input, padding, self.scale_grad_by_freq, self.sparse, sink)

    return forward
