"""The capture of ``nn.Linear``: for y = x W^T the gradient is dY^T X, which is never computed.

    Y = dY^T (X V)      Z = X^T (dY U)

are two thin products each, and replace the weight-gradient GEMM. Where the module's ``weight`` is not the parameter
(``functional_call``, a parametrization, pruning), where a hook stands on the weight, and where ``autograd.grad`` asks
for the gradient itself, G is computed and goes the way of every gradient.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: F401  what TorchScript finds in nn.Linear's forward
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_mofa.capture import compiled
from ds_mofa.capture.autograd import plain_linear, wanted
from ds_mofa.capture.held import holds, leaf_in, own_weight, refuse_replaced, replace_forward
from ds_mofa.capture.sink import Gathered, Sink
from ds_mofa.capture.sketch import Sketch
from ds_mofa.kernels import fp8
from ds_mofa.kernels.int8 import whole
from ds_mofa.options import OptionError
from ds_mofa.parameters import Matrix

__all__ = ["LinearCapture", "SketchedLinear", "multiply_in_eight_bits"]


class SketchedLinear(torch.autograd.Function):
    """y = x W^T + b whose backward sketches the weight gradient and does not compute it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, sketch: Sink, gathered: Gathered | None) -> Tensor:
        ctx.sketch, ctx.gathered, ctx.has_bias = sketch, gathered, bias is not None
        W, b = _as(whole(weight), x.dtype), None if bias is None else _as(bias, x.dtype)
        if sketch.fp8:
            y, scales = fp8.product(x, W)
            ctx.save_for_backward(x, weight, scales)
            if b is not None:  # not in place where torch 2.11 traces it, which then finds no gradient
                y = y + b if torch.compiler.is_compiling() else y.add_(b)
        else:
            ctx.save_for_backward(x, weight)
            y = plain_linear(x, W, b)
        if not torch.compiler.is_compiling() and y._is_view():  # as it is with a bias: no view may be written in place
            y = torch.ops.aten._unsafe_view(y, y.shape)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        # A backward that is itself recorded must refuse to be differentiated; being told so costs every other one 5 us.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy: Tensor):
    x, weight, *scales = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx = dw = db = None
    if need_x:
        if ctx.gathered is None:
            dx = _input_gradient(dy, whole(weight), *scales)
        else:
            with ctx.gathered(weight) as gathered:
                dx = _input_gradient(dy, gathered, *scales)
    if need_weight:
        sketch = ctx.sketch
        if torch.compiler.is_compiling():
            if type(sketch) is Sketch:
                compiled.add_linear(x, dy, sketch.key)
            else:
                sketch.add_linear(x, dy)
        else:
            asked = wanted(ctx.next_functions[1][0])
            if asked is None or asked and sketch.param is not None and sketch.param._backward_hooks:
                dw = _as(dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1]), weight.dtype)
            elif asked:
                sketch.add_linear(x, dy)
    if ctx.has_bias and need_bias:
        db = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, dw, db, None, None


def _input_gradient(dy: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    weight = _as(weight, dy.dtype)
    return dy @ weight if scales is None else fp8.input_gradient(dy, weight, scales)


_backward_once = once_differentiable(_backward)

# Function.apply looks through its arguments for what only functorch leaves there, at 4 us a linear.
_apply = super(torch.autograd.Function, SketchedLinear).apply


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, at once where there is nothing to do: here every microsecond counts, a thousand times."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _sketched_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sketch: Sink, gathered: Gathered | None) -> Tensor:
    if torch.compiler.is_compiling():
        return SketchedLinear.apply(x, weight, bias, sketch, gathered)
    if torch._C._are_functorch_transforms_active():  # what is transformed is autograd's to differentiate
        return plain_linear(x, _as(weight, x.dtype), None if bias is None else _as(bias, x.dtype))
    return _apply(x, weight, bias, sketch, gathered)


class LinearCapture:
    """Replaces the ``forward`` of each plain ``nn.Linear``."""

    def serves(self, module: nn.Module, matrix: Matrix) -> bool:
        # Not the module's class: fully_shard makes one of its own, with the same forward, of a linear that is a root.
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            return False
        return holds(module, matrix)

    def attach(self, module: nn.Module, matrix: Matrix, sink: Sink, gathered: Gathered | None) -> Callable[[], None]:
        """See :class:`ds_mofa.capture.sink.Capture`."""
        refuse_replaced(module, nn.Linear.forward)
        sink.leaf = leaf_in(module)
        return replace_forward(module, _forward_of(module, sink, gathered))


def multiply_in_eight_bits(
    matrices: Sequence[Matrix], sinks: Sequence[Sink], device: torch.device, dtype: torch.dtype
) -> None:
    """Have the products of these matrices taken in floats of eight bits (:mod:`ds_mofa.kernels.fp8`): of those that plain
    linears hold, of sides that the device multiplies, and that ``include`` does not name.

    Args:
        sinks: of the matrices, before they are attached.
        device, dtype: of the weights.

    Raises:
        OptionError: there is none, or the device or the dtype forbids it.
    """
    unable = fp8.refusal(device, dtype)
    linear = LinearCapture()
    for matrix, sink in zip(matrices, sinks):
        held = any(linear.serves(module, matrix) for module in matrix.modules)
        sink.fp8 = held and not matrix.included and fp8.serves(*matrix.shape)
    if unable is None and not any(sink.fp8 for sink in sinks):
        unable = (
            "it is of nn.Linear with sides that are multiples of 16, which `include` does not name, and this model's matrices "
            "have none"
        )
    if unable is not None:
        raise OptionError(f"fp8: {unable}. Leave it out")


def _forward_of(module: nn.Module, sink: Sink, gathered: Gathered | None):
    is_own = own_weight(sink.param)

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        # A deep copy, made for an average or a reference, has no sketch; nor has a weight that is computed or lent.
        if self is not module or not is_own(self, weight) or torch._C._get_tracing_state() is not None:
            return nn.Linear.forward(self, input)
        if not torch.is_grad_enabled() or not weight.requires_grad:
            return plain_linear(input, weight, bias)
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return _sketched_linear(input, weight, bias, sink, gathered)
        if input.dtype != weight.dtype:
            return nn.Linear.forward(self, input)  # which says what is wrong, in training as in evaluation
        return _sketched_linear(input, weight, bias, sink, gathered)

    return forward
