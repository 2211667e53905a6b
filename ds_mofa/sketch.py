"""Capture: every backward adds to each matrix's sketches Y = G V and Z = G^T U, and G is never kept.

Two ways, the same sums. The *linear* never computes G: for y = x W^T the gradient is dY^T X, so
Y = dY^T (X V) and Z = X^T (dY U), two thin products each in the place of the weight-gradient GEMM. The
*hook* sketches a gradient that autograd has computed and drops it; it serves every 2-D parameter that is
not an ``nn.Linear``, and catches what reaches a linear's weight by another road.
"""

import types
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_mofa.options import CaptureMode, OptionError
from ds_mofa.parameters import Matrix
from ds_mofa.phases import phase

__all__ = ["Sketch", "attach", "SketchedLinear"]

# zero.Init replaces F.linear for the whole process by one that computes weight gradients.
_linear = torch._C._nn.linear
_OURS = "ds_mofa_forward"


class Sketch:
    """Where one matrix's sketches add up, and the factors that they are taken with.

    Attributes:
        Y: (m, r), fp32, sum of G V over the micro-batches since the last step.
        Z: (n, r), fp32, sum of G^T U.
        U: (m, r), working copy in the compute dtype; before the first step the test matrix Psi.
        V: (n, r), likewise; before the first step Omega.
    """

    __slots__ = ("Y", "Z", "U", "V")

    def __init__(self, Y: Tensor, Z: Tensor, U: Tensor, V: Tensor):
        self.Y, self.Z, self.U, self.V = Y, Z, U, V

    def add_linear(self, x: Tensor, dy: Tensor) -> None:
        """Add G = dy^T x without forming it. x: (tokens, n), dy: (tokens, m), of one dtype."""
        _add_product(self.Y, dy.mT, x @ self.V.to(x.dtype))
        _add_product(self.Z, x.mT, dy @ self.U.to(dy.dtype))

    @torch.no_grad()
    def add_gradient(self, grad: Tensor) -> None:
        """Add a gradient that exists. grad: (m, n)."""
        grad = grad.to_dense() if grad.is_sparse else grad
        _add_product(self.Y, grad, self.V.to(grad.dtype))
        _add_product(self.Z, grad.mT, self.U.to(grad.dtype))


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed in out's precision where the device's GEMM can."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(a @ b)


class SketchedLinear(torch.autograd.Function):
    """y = x W^T + b whose backward sketches the weight gradient in the place of computing it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, sketch: Sketch, gathered) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sketch, ctx.gathered, ctx.has_bias = sketch, gathered, bias is not None
        bias = bias.to(x.dtype) if bias is not None else None
        return _linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = db = None
        rows = dy.reshape(-1, dy.shape[-1])
        if need_x:
            if ctx.gathered is None:
                dx = (rows @ weight.to(dy.dtype)).view(x.shape)
            else:
                with ctx.gathered(weight) as whole:
                    dx = (rows @ whole.to(dy.dtype)).view(x.shape)
        if need_weight:
            with phase("capture"):
                ctx.sketch.add_linear(x.reshape(-1, x.shape[-1]), rows)
        if ctx.has_bias and need_bias:
            db = rows.sum(0)
        return dx, None, db, None, None


def attach(matrices: Sequence[Matrix], sketches: Sequence[Sketch], mode: CaptureMode, gathered=None) -> "Attachment":
    """Make every backward of the model fill ``sketches``.

    Args:
        matrices: the matrix parameters; ``requires_grad`` stays True, ``.grad`` stays None.
        sketches: one for each.
        mode: ``"linear"`` or ``"hook"``.
        gathered: context manager from a weight to the whole of it, for backends that release weights
            between forward and backward; None where they stay.

    Returns:
        The attachment, whose ``remove()`` puts the model back as it was.
    """
    attachment = Attachment()
    for matrix, sketch in zip(matrices, sketches):
        if mode == "linear":
            for module in matrix.modules:
                if type(module) is nn.Linear:
                    attachment.replace_forward(module, sketch, gathered)
        attachment.add_hook(matrix.param, sketch)
    return attachment


class Attachment:
    """What :func:`attach` changed in a model."""

    def __init__(self):
        self._forwards: list[tuple[nn.Module, types.MethodType]] = []
        self._hooks = []

    def replace_forward(self, module: nn.Linear, sketch: Sketch, gathered) -> None:
        if "forward" in vars(module) and not hasattr(module.forward, _OURS):
            other = getattr(module.forward, "__qualname__", repr(module.forward))
            raise OptionError(
                f'the forward of {module} has been replaced by {other}, which capture "linear" would undo: build '
                'the optimizer before that is done, or set capture to "hook"'
            )

        def forward(self, x: Tensor) -> Tensor:
            if self is not module:  # a deep copy, made for an average or a reference, has no sketch of its own
                return nn.Linear.forward(self, x)
            if not torch.is_grad_enabled() or not self.weight.requires_grad:
                return _linear(x, self.weight, self.bias)
            device = x.device.type
            if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(device))
                with torch.autocast(device, enabled=False):
                    return SketchedLinear.apply(x, self.weight, self.bias, sketch, gathered)
            return SketchedLinear.apply(x, self.weight, self.bias, sketch, gathered)

        setattr(forward, _OURS, True)
        module.forward = types.MethodType(forward, module)
        self._forwards.append((module, module.forward))

    def add_hook(self, param: nn.Parameter, sketch: Sketch) -> None:
        def hook(param: nn.Parameter) -> None:
            if param.grad is not None:
                with phase("capture"):
                    sketch.add_gradient(param.grad)
                param.grad = None

        self._hooks.append(param.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        for module, forward in self._forwards:
            if vars(module).get("forward") is forward:  # a later optimizer's stays
                del module.forward
        for hook in self._hooks:
            hook.remove()
        self._forwards, self._hooks = [], []
