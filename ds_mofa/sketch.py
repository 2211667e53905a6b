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

from ds_mofa.kernels import triton_serves
from ds_mofa.options import CaptureMode, OptionError
from ds_mofa.parameters import Matrix
from ds_mofa.phases import phase

__all__ = ["Sketch", "Queue", "attach", "SketchedLinear", "OURS", "add_product", "plain_linear"]

# zero.Init replaces F.linear for the whole process by one that computes weight gradients.
plain_linear = torch._C._nn.linear
OURS = "ds_mofa_forward"  # marks a forward that this package has put in


class Sketch:
    """Where one matrix's sketches add up, and the factors that they are taken with.

    Attributes:
        Y: (m, r), fp32, sum of G V over the micro-batches since the last step.
        Z: (n, r), fp32, sum of G^T U.
        U: (m, r), working copy in the compute dtype; before the first step the test matrix Psi.
        V: (n, r), likewise; before the first step Omega.
    """

    __slots__ = ("Y", "Z", "U", "V", "_queue", "_addresses")

    def __init__(self, Y: Tensor, Z: Tensor, U: Tensor, V: Tensor, queue: "Queue | None" = None):
        self.Y, self.Z, self.U, self.V = Y, Z, U, V
        self._queue = queue
        self._addresses = tuple(tensor.data_ptr() for tensor in (Y, Z, U, V))

    def add_linear(self, x: Tensor, dy: Tensor) -> None:
        """Add G = dy^T x without forming it. x: (..., n), dy: (..., m), of one dtype."""
        # In a compiled backward the products stand in the graph themselves.
        if self._queue is not None and x.dtype == self.V.dtype == dy.dtype and not torch.compiler.is_compiling():
            self._queue.add(self._addresses, x.contiguous(), dy.contiguous())
            return
        with phase("capture"):
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            add_product(self.Y, dy.mT, x @ self.V.to(x.dtype))
            add_product(self.Z, x.mT, dy @ self.U.to(dy.dtype))

    def emptied(self) -> "Sketch":
        """One with the same factors, and sums of its own that are zero."""
        return Sketch(torch.zeros_like(self.Y), torch.zeros_like(self.Z), self.U, self.V)

    @torch.no_grad()
    def add_gradient(self, grad: Tensor) -> None:
        """Add a gradient that exists. grad: (m, n)."""
        grad = grad.to_dense() if grad.is_sparse else grad
        add_product(self.Y, grad, self.V.to(grad.dtype))
        add_product(self.Z, grad.mT, self.U.to(grad.dtype))


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """out += alpha a @ b, summed in out's precision where the device's GEMM can."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=alpha)
    elif out.is_cuda:
        torch.addmm(out, a, b, alpha=alpha, out_dtype=out.dtype, out=out)
    else:
        out.add_(a @ b, alpha=alpha)


class Queue:
    """Linears whose sketches wait to be taken together, on a GPU: few launches in the place of four for each.

    Their activations and output gradients live until then, a bounded number of bytes. What is left when a backward
    ends is taken then.
    """

    COUNT = 16
    BYTES = 200_000_000

    def __init__(self, rank: int, dtype: torch.dtype):
        self._rank, self._dtype = rank, dtype
        self._waiting: list[tuple] = []
        self._bytes = 0

    @classmethod
    def serving(cls, working: Tensor, sketches: Tensor, rank: int) -> "Queue | None":
        """One for sketches of this dtype and device, or None where each linear is taken at once."""
        kernels = triton_serves(working) and working.dtype in (torch.bfloat16, torch.float16)
        return cls(rank, working.dtype) if kernels and sketches.dtype == torch.float32 else None

    def add(self, addresses: tuple[int, int, int, int], x: Tensor, dy: Tensor) -> None:
        """Sketch dy^T x later; within a backward.

        Args:
            addresses: of Y, Z, U and V.
            x: (..., n), contiguous, in the queue's dtype.
            dy: (..., m), likewise.
        """
        if x.numel() == 0:  # an expert that no token went to
            return
        if not self._waiting:
            torch.autograd.Variable._execution_engine.queue_callback(self.take)
        self._waiting.append((addresses, x, dy))
        self._bytes += (x.numel() + dy.numel()) * x.element_size()
        if len(self._waiting) >= self.COUNT or self._bytes >= self.BYTES:
            self.take()

    def take(self) -> None:
        """Take the sketches of all that wait."""
        if self._waiting:
            from ds_mofa.kernels import _capture

            waiting = self._waiting
            self.forget()
            with phase("capture"):
                _capture.launch(waiting, self._rank, self._dtype)

    def forget(self) -> None:
        """Drop what waits: a backward that raised has left it."""
        self._waiting, self._bytes = [], 0


class SketchedLinear(torch.autograd.Function):
    """y = x W^T + b whose backward sketches the weight gradient in the place of computing it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, sketch: Sketch, gathered) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sketch, ctx.gathered, ctx.has_bias = sketch, gathered, bias is not None
        return plain_linear(x, _as(weight, x.dtype), None if bias is None else _as(bias, x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor):
        # A backward that is itself recorded must refuse to be differentiated; being told so costs every other one 5 us.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx = db = None
    if need_x:
        if ctx.gathered is None:
            dx = dy @ _as(weight, dy.dtype)
        else:
            with ctx.gathered(weight) as whole:
                dx = dy @ _as(whole, dy.dtype)
    if need_weight:
        ctx.sketch.add_linear(x, dy)
    if ctx.has_bias and need_bias:
        db = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, None, db, None, None


_backward_once = once_differentiable(_backward)

# Function.apply looks through its arguments for what only functorch leaves there, at 4 us a linear.
_apply = super(torch.autograd.Function, SketchedLinear).apply


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, at once where there is nothing to do: here every microsecond counts, a thousand times."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _sketched_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sketch: Sketch, gathered) -> Tensor:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return SketchedLinear.apply(x, weight, bias, sketch, gathered)
    return _apply(x, weight, bias, sketch, gathered)


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
        if "forward" in vars(module) and not hasattr(module.forward, OURS):
            other = getattr(module.forward, "__qualname__", repr(module.forward))
            raise OptionError(
                f'the forward of {module} has been replaced by {other}, which capture "linear" would undo: build '
                'the optimizer before that is done, or set capture to "hook"'
            )

        def forward(self, x: Tensor) -> Tensor:
            if self is not module:  # a deep copy, made for an average or a reference, has no sketch of its own
                return nn.Linear.forward(self, x)
            weight, bias = self.weight, self.bias
            if not torch.is_grad_enabled() or not weight.requires_grad:
                return plain_linear(x, weight, bias)
            device = x.device.type
            if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(device))
                with torch.autocast(device, enabled=False):
                    return _sketched_linear(x, weight, bias, sketch, gathered)
            return _sketched_linear(x, weight, bias, sketch, gathered)

        setattr(forward, OURS, True)
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
