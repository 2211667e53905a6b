"""The products of experts, one group of rows each, for a backward that sketches: with the rows sorted by expert, dY_e and X_e
those of expert e,

    G_e = dY_e^T X_e      Y_e = dY_e^T (X_e V_e)      Z_e = X_e^T (dY_e U_e)

for all experts at once, and no gradient of the stack is formed. Of weights that are stored (in, out), X and dY change places.
Backward keeps the weight itself and no view of it: ZeRO-3 and FSDP2 release what a view would hold.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_mofa.capture import compiled
from ds_mofa.capture.autograd import wanted
from ds_mofa.capture.products import grouped_outer, grouped_product
from ds_mofa.capture.sink import Gathered, Sink
from ds_mofa.capture.sketch import Sketch

__all__ = ["Permuted", "SketchedExperts", "product"]


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
        return product(x if rows is None else x[rows], weight, ends, transposed)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """y_e = x_e W_e^T, (S, out); see :class:`SketchedExperts`."""
    weight = weight.to(x.dtype)
    return grouped_product(x, weight if transposed else weight.mT, ends)


def _backward(ctx, dy: Tensor):
    x, weight, ends, rows, back = ctx.saved_tensors
    dx = dw = None
    dy = dy.contiguous()  # a broadcast one is not, which no grouped product takes
    if ctx.needs_input_grad[0]:
        if ctx.gathered is None:
            dx = product(dy, weight, ends, not ctx.transposed)
        else:
            with ctx.gathered(weight) as whole:
                dx = product(dy, whole, ends, not ctx.transposed)
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
                dw = grouped_outer(left, right, ends).to(weight.dtype)
            elif asked:
                sketch.add_grouped(left, right, ends, left_rows, right_rows)
    return dx, dw, None, None, None, None, None, None


_backward_once = once_differentiable(_backward)


def _gathered_sums(dx: Tensor, back: Tensor, count: int) -> Tensor:
    """What autograd would scatter, gathered and added in one order: (count, n) from (S, n)."""
    dx = dx[back]
    return dx if len(dx) == count else dx.view(count, -1, dx.shape[-1]).sum(1)


class Permuted(torch.autograd.Function):
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
