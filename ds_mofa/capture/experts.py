"""The capture of stacked experts, (E, m, n): each token goes to some of E linear maps. With the token-expert pairs sorted by
expert, dY_e and X_e the rows of expert e,

    G_e = dY_e^T X_e      Y_e = dY_e^T (X_e V_e)      Z_e = X_e^T (dY_e U_e)

for all experts at once, and no gradient of the stack is formed. Of weights that are stored (in, out), X and dY change places.

It serves transformers' modules whose forward is a function of its registry of experts functions, whichever is chosen there: the
module's forward becomes one that computes the same, with grouped products. Backward keeps the weight itself and no view of it:
ZeRO-3 and FSDP2 release what a view would hold.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_mofa.capture import compiled
from ds_mofa.capture.autograd import wanted
from ds_mofa.capture.held import holds, leaf_in, own_weight, refuse_replaced, replace_forward
from ds_mofa.capture.products import grouped_product
from ds_mofa.capture.sink import Gathered, Sink
from ds_mofa.capture.sketch import Sketch
from ds_mofa.options import OptionError
from ds_mofa.parameters import Matrix
from ds_mofa.parameters.kinds import EXPERTS_WEIGHTS, holds_experts

__all__ = ["ExpertsCapture", "SketchedExperts"]


class SketchedExperts(torch.autograd.Function):
    """y_e = x_e W_e^T of every expert, whose backward sketches the weights' gradients and does not compute them."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        ends: Tensor,
        transposed: bool,
        sketch: Sink | None,
        gathered: Gathered | None,
        rows: Tensor | None = None,
        back: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: (S, in), sorted by expert; with ``rows`` (T, in), of which each goes to S / T experts.
            weight: (E, out, in), or (E, in, out) where ``transposed``.
            ends: (E,), int32; rows [ends[e - 1], ends[e]) are expert e's, and there are no others.
            sketch: takes the place of the gradient; None: it is formed.
            gathered: see :class:`ds_mofa.capture.sink.Capture`.
            rows: (S,), int32, which row of x each of the sorted is.
            back: (S,), where the S / T of each row of x are among the sorted, row by row.

        Returns:
            (S, out).
        """
        ctx.save_for_backward(x, weight, ends, rows, back)
        ctx.transposed, ctx.sketch, ctx.gathered = transposed, sketch, gathered
        return _forward(x if rows is None else x[rows], weight, ends, transposed)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _forward(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    weight = weight.to(x.dtype)
    return grouped_product(x, weight if transposed else weight.mT, ends)


def _backward(ctx, dy: Tensor):
    x, weight, ends, rows, back = ctx.saved_tensors
    dx = dw = None
    dy = dy.contiguous()  # a broadcast one is not, which no grouped product takes
    if ctx.needs_input_grad[0]:
        if ctx.gathered is None:
            dx = _forward(dy, weight, ends, not ctx.transposed)
        else:
            with ctx.gathered(weight) as whole:
                dx = _forward(dy, whole, ends, not ctx.transposed)
        dx = dx if back is None else _gathered_sums(dx, back, x.shape[0])
    if ctx.needs_input_grad[1]:
        left, right, left_rows, right_rows = (x, dy, rows, None) if ctx.transposed else (dy, x, None, rows)
        sketch = ctx.sketch
        if sketch is not None and torch.compiler.is_compiling():
            if type(sketch) is Sketch:
                compiled.add_grouped(left, right, ends, left_rows, right_rows, sketch.key)
            else:
                sketch.add_grouped(left, right, ends, left_rows, right_rows)
        else:
            asked = sketch is None or wanted(ctx.next_functions[1][0])
            if sketch is None or asked is None or asked and sketch.param is not None and sketch.param._backward_hooks:
                left, right = (a if own is None else a[own] for a, own in ((left, left_rows), (right, right_rows)))
                dw = _dense(left, right, ends).to(weight.dtype)
            elif asked:
                sketch.add_grouped(left, right, ends, left_rows, right_rows)
    return dx, dw, None, None, None, None, None, None


_backward_once = once_differentiable(_backward)


def _dense(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """The gradient of the whole stack, (E, m, n)."""
    out = left.new_zeros(len(ends), left.shape[-1], right.shape[-1])
    first = 0
    for e, last in enumerate(ends.tolist()):
        torch.mm(left[first:last].mT, right[first:last], out=out[e])
        first = last
    return out


def _gathered_sums(dx: Tensor, back: Tensor, count: int) -> Tensor:
    """What autograd would scatter, gathered and added in one order: (count, n) from (S, n)."""
    dx = dx[back]
    return dx if len(dx) == count else dx.view(count, -1, dx.shape[-1]).sum(1)


class _Permuted(torch.autograd.Function):
    """Rows in another order, whose backward gathers, where autograd's scatters."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """Row i of the result is row order[i] of x, (S, n); ``back`` is the inverse of ``order``, (S,)."""
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx, dy: Tensor):
        (back,) = ctx.saved_tensors
        return dy[back], None, None


class ExpertsCapture:
    """Replaces the ``forward`` of each of transformers' experts modules."""

    def serves(self, module: nn.Module, matrix: Matrix) -> bool:
        name = matrix.name.rpartition(".")[2]
        return holds_experts(module) and name in EXPERTS_WEIGHTS and holds(module, matrix, name)

    def attach(self, module: nn.Module, matrix: Matrix, sink: Sink, gathered: Gathered | None) -> Callable[[], None]:
        """See :class:`ds_mofa.capture.sink.Capture`. The forward is replaced with the first of its weights, and put back with
        the last.
        """
        _refuse_parallel(module, matrix)
        name = matrix.name.rpartition(".")[2]
        sink.leaf = leaf_in(module, name)
        present = vars(module).get("forward")
        own = getattr(present, "__func__", None)
        if isinstance(getattr(own, _SINKS, None), dict):
            sinks, undo = getattr(own, _SINKS), getattr(own, _UNDO)
        else:
            refuse_replaced(module, type(module).forward)
            sinks = {}
            function = _forward_of(module, sinks)
            undo = replace_forward(module, function)
            setattr(function, _SINKS, sinks)
            setattr(function, _UNDO, undo)
        entry = sinks[name] = sink, gathered, own_weight(matrix.param, name)

        def remove() -> None:
            if sinks.get(name) is entry:
                del sinks[name]
            if not sinks:
                undo()

        return remove


_SINKS, _UNDO = "ds_mofa_sinks", "ds_mofa_undo"


def _refuse_parallel(module: nn.Module, matrix: Matrix) -> None:
    count = module.num_experts
    if matrix.stack != count:
        raise OptionError(
            f"{matrix.name!r} holds {matrix.stack} of the module's {count} experts: expert parallelism is not served. Leave "
            "enable_expert_parallel out, and shard the model with ZeRO-3 or fully_shard; or exclude the experts"
        )


def _forward_of(module: Any, sinks: dict[str, Any]) -> Callable[..., Tensor]:
    """What transformers' experts functions compute, by grouped products."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        of_class = functools.partial(type(module).forward, self, hidden_states, top_k_index, top_k_weights)
        if self is not module or torch._C._get_tracing_state() is not None:
            return of_class()
        if torch._C._are_functorch_transforms_active():
            return of_class()
        if not all(is_own(self, getattr(self, name)) for name, (_, _, is_own) in sinks.items()):
            return of_class()
        tokens, k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        ends = _ends(experts, self.num_experts)
        project = functools.partial(_project, self, sinks, experts, ends, _autocast(hidden_states))
        x = project("gate_up_proj" if self.has_gate else "up_proj", hidden_states, (order // k).int(), back)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = project("down_proj", x) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        x = _Permuted.apply(x, back, order)
        return x.view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    return forward


def _autocast(x: Tensor) -> torch.dtype | None:
    """What products are to be computed in, where that is not the weights' dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else None


def _ends(experts: Tensor, count: int) -> Tensor:
    """Where each expert's rows end, (count,), int32, of the sorted experts of all rows; the host waits for nothing."""
    numbers = torch.arange(count, dtype=experts.dtype, device=experts.device)
    return torch.searchsorted(experts, numbers, right=True, out_int32=True)


def _project(
    module: Any,
    sinks: dict[str, Any],
    experts: Tensor,
    ends: Tensor,
    dtype: torch.dtype | None,
    name: str,
    x: Tensor,
    rows: Tensor | None = None,
    back: Tensor | None = None,
) -> Tensor:
    weight = getattr(module, name)
    x = x.to(weight.dtype if dtype is None else dtype)
    any_gathered = next((gathered for _, gathered, _ in sinks.values()), None)
    sink, gathered, _ = sinks.get(name, (None, any_gathered, None))
    if torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad):
        y = SketchedExperts.apply(x, weight, ends, module.is_transposed, sink, gathered, rows, back)
    else:
        y = _forward(x if rows is None else x[rows], weight, ends, module.is_transposed)
    return y + getattr(module, f"{name}_bias").to(y.dtype)[experts] if module.has_bias else y
