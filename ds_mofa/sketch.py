"""Capture: every backward adds to each matrix's sketches Y = G V and Z = G^T U, and G is never kept.

Two ways, the same sums. The *linear* never computes G: for y = x W^T the gradient is dY^T X, so
Y = dY^T (X V) and Z = X^T (dY U), two thin products each in the place of the weight-gradient GEMM. The
*hook* sketches a gradient that autograd has computed and drops it; it serves every 2-D parameter that is
not an ``nn.Linear``, and catches what reaches a linear's weight by another road.

Capture follows autograd: what is added is what autograd would have added to ``.grad``. ``autograd.grad(loss, x)`` and
``backward(inputs=...)`` that leave a weight out add nothing to its sketch; where the module's ``weight`` is not the
parameter (``functional_call``, a parametrization, pruning), where a hook stands on the weight, and where
``autograd.grad`` asks for the gradient itself, G is computed and goes the way of every gradient.
"""

import types
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: F401  what TorchScript finds in nn.Linear's forward
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_mofa.kernels import triton_serves
from ds_mofa.options import CaptureMode, OptionError
from ds_mofa.parameters import Matrix
from ds_mofa.phases import phase

if TYPE_CHECKING:
    from ds_mofa.gradient import SketchedGradient

__all__ = ["Sketch", "Queue", "attach", "SketchedLinear", "OURS", "add_product", "plain_linear", "wanted"]

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
        param: the matrix, from :func:`attach` on.
        grad: what ``param.grad`` is while it has a gradient; None where ``.grad`` stays None.
        filled: with a ``grad``: whether Y and Z hold anything.
        unmarked: they do, and ``.grad`` could not be made to say so.
    """

    __slots__ = ("Y", "Z", "U", "V", "param", "grad", "filled", "unmarked", "key", "_queue", "_addresses", "__weakref__")

    def __init__(self, Y: Tensor, Z: Tensor, U: Tensor, V: Tensor, queue: "Queue | None" = None):
        self.Y, self.Z, self.U, self.V = Y, Z, U, V
        self.param: nn.Parameter | None = None
        self.grad: "SketchedGradient | None" = None
        self.filled = self.unmarked = False
        self.key = _key_of(self)
        self._queue = queue
        self._addresses = tuple(tensor.data_ptr() for tensor in (Y, Z, U, V))

    def add_linear(self, x: Tensor, dy: Tensor) -> None:
        """Add G = dy^T x without forming it. x: (..., n), dy: (..., m), of one dtype."""
        self.open(self.Y, self.Z)
        if self._queue is not None and x.dtype == self.V.dtype == dy.dtype:
            self._queue.add(self._addresses, x.contiguous(), dy.contiguous())
            return
        self.add_linear_to(self.Y, self.Z, x, dy)

    def add_linear_to(self, Y: Tensor, Z: Tensor, x: Tensor, dy: Tensor) -> None:
        """:meth:`add_linear` into other sums, at once."""
        with phase("capture"):
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            add_product(Y, dy.mT, x @ self.V.to(x.dtype))
            add_product(Z, x.mT, dy @ self.U.to(dy.dtype))

    @torch.no_grad()
    def add_gradient(self, grad: Tensor, Y: Tensor | None = None, Z: Tensor | None = None) -> None:
        """Add a gradient that exists. grad: (m, n)."""
        Y, Z = (self.Y, self.Z) if Y is None else (Y, Z)
        self.open(Y, Z)
        grad = grad.to_dense() if grad.is_sparse else grad
        add_product(Y, grad, self.V.to(grad.dtype))
        add_product(Z, grad.mT, self.U.to(grad.dtype))

    def add_sums(self, other: "Sketch", scale: Tensor) -> None:
        """Add what another sketch of the same factors holds, times a scalar tensor."""
        self.open(self.Y, self.Z)
        self.Y.addcmul_(other.Y, scale.to(other.Y.dtype))
        self.Z.addcmul_(other.Z, scale.to(other.Z.dtype))

    def open(self, Y: Tensor, Z: Tensor) -> None:
        """Before something is added to Y and Z: let ``.grad`` say that there is a gradient."""
        mark = self.grad
        if mark is not None and not (self.filled and self.param.grad is mark):
            mark.begin(self, Y, Z)

    def clear(self, Y: Tensor, Z: Tensor) -> None:
        """Drop what Y and Z hold, and what waits to be added to them since a backward that raised."""
        if self._queue is not None:
            self._queue.take()
        Y.zero_()
        Z.zero_()

    def emptied(self) -> "Sketch":
        """One with the same factors, and sums of its own that are zero."""
        return Sketch(torch.zeros_like(self.Y), torch.zeros_like(self.Z), self.U, self.V)


_sketches: "weakref.WeakValueDictionary[int, Sketch]" = weakref.WeakValueDictionary()
_last_key = 0


def _key_of(sketch: Sketch) -> Tensor:
    """A number for the sketch, as a tensor: a compiled graph takes it as an input, where an int would be a constant of
    the graph, and every layer would be compiled for itself.
    """
    global _last_key
    _last_key += 1
    _sketches[_last_key] = sketch
    return torch.tensor(_last_key, dtype=torch.int64, device="cpu")


@torch.library.custom_op("ds_mofa::add_linear", mutates_args=("Y", "Z"))
def _add_linear(Y: Tensor, Z: Tensor, x: Tensor, dy: Tensor, key: Tensor) -> None:
    """:meth:`Sketch.add_linear` in a compiled backward, which computes all that it may be asked for: whether this one is
    asked for the weight's gradient is known only when it runs.
    """
    sketch = _sketches[int(key)]
    if sketch.param is not None:
        answer = wanted(_leaf_node(sketch.param))
        if answer is None:
            raise RuntimeError(
                "autograd.grad asks for the gradient of a matrix through a compiled forward, which has sketches of it "
                "alone: call the model without torch.compile there"
            )
        if not answer:
            return
    sketch.open(Y, Z)
    # Compiled autograd writes .grad once more, as it was when it was traced, after all has run.
    sketch.unmarked = sketch.grad is not None and torch._dynamo.compiled_autograd.in_compiled_autograd_region
    sketch.add_linear_to(Y, Z, x, dy)


def _leaf_node(param: nn.Parameter) -> torch.autograd.graph.Node:
    """The AccumulateGrad node of a leaf, from within an operator, below autograd: autograd makes it and hands it out."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        return torch.autograd.graph.get_gradient_edge(param).node


def wanted(node: torch.autograd.graph.Node | None) -> bool | None:
    """Whether the running backward accumulates into the leaf of this AccumulateGrad node; None where it is an
    ``autograd.grad`` that returns that leaf's gradient.
    """
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        if "autograd.grad" not in str(error):
            raise
        return None


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
        self._backward = -1  # of the last that came

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
        backward = torch._C._current_graph_task_id()
        if not self._waiting or backward != self._backward:
            self.take()  # left by a backward that raised: autograd keeps what such a one has added
            self._backward = backward
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
        """Drop what waits."""
        self._waiting, self._bytes = [], 0


class SketchedLinear(torch.autograd.Function):
    """y = x W^T + b whose backward sketches the weight gradient in the place of computing it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, sketch: Sketch, gathered) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sketch, ctx.gathered, ctx.has_bias = sketch, gathered, bias is not None
        y = plain_linear(x, _as(weight, x.dtype), None if bias is None else _as(bias, x.dtype))
        if not torch.compiler.is_compiling() and y._is_view():  # as it is with a bias: no view may be written in place
            y = torch.ops.aten._unsafe_view(y, y.shape)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        # A backward that is itself recorded must refuse to be differentiated; being told so costs every other one 5 us.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx = dw = db = None
    if need_x:
        if ctx.gathered is None:
            dx = dy @ _as(weight, dy.dtype)
        else:
            with ctx.gathered(weight) as whole:
                dx = dy @ _as(whole, dy.dtype)
    if need_weight:
        sketch = ctx.sketch
        if torch.compiler.is_compiling():
            if type(sketch) is Sketch:
                _add_linear(sketch.Y, sketch.Z, x, dy, sketch.key)
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


_backward_once = once_differentiable(_backward)

# Function.apply looks through its arguments for what only functorch leaves there, at 4 us a linear.
_apply = super(torch.autograd.Function, SketchedLinear).apply


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, at once where there is nothing to do: here every microsecond counts, a thousand times."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _sketched_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sketch: Sketch, gathered) -> Tensor:
    if torch.compiler.is_compiling():
        return SketchedLinear.apply(x, weight, bias, sketch, gathered)
    if torch._C._are_functorch_transforms_active():  # what is transformed is autograd's to differentiate
        return plain_linear(x, _as(weight, x.dtype), None if bias is None else _as(bias, x.dtype))
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
    try:
        for matrix, sketch in zip(matrices, sketches):
            sketch.param = matrix.param
            if mode == "linear":
                for module in matrix.modules:
                    if type(module) is nn.Linear and module._parameters.get("weight") is matrix.param:
                        attachment.replace_forward(module, matrix.param, sketch, gathered)
            attachment.add_hook(matrix.param, sketch)
    except OptionError:
        attachment.remove()
        raise
    return attachment


class Attachment:
    """What :func:`attach` changed in a model."""

    def __init__(self):
        self._forwards: list[tuple[nn.Module, types.MethodType]] = []
        self._hooks = []

    def replace_forward(self, module: nn.Linear, param: nn.Parameter, sketch: Sketch, gathered) -> None:
        other = vars(module).get("forward")
        if other is not None and not hasattr(other, OURS) and getattr(other, "__func__", None) is not nn.Linear.forward:
            other = getattr(other, "__qualname__", repr(other))
            raise OptionError(
                f'the forward of {module} has been replaced by {other}, which capture "linear" would undo: build '
                'the optimizer before that is done, or set capture to "hook"'
            )

        def forward(self, input: Tensor) -> Tensor:
            weight, bias = self.weight, self.bias
            # A deep copy, made for an average or a reference, has no sketch; nor has a weight that is computed or lent.
            if self is not module or weight is not param or torch._C._get_tracing_state() is not None:
                return nn.Linear.forward(self, input)
            if not torch.is_grad_enabled() or not weight.requires_grad:
                return plain_linear(input, weight, bias)
            device = input.device.type
            if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
                input = input.to(torch.get_autocast_dtype(device))
                with torch.autocast(device, enabled=False):
                    return _sketched_linear(input, weight, bias, sketch, gathered)
            if input.dtype != weight.dtype:
                return nn.Linear.forward(self, input)  # which says what is wrong, in training as in evaluation
            return _sketched_linear(input, weight, bias, sketch, gathered)

        setattr(forward, OURS, True)
        forward.__wrapped__ = nn.Linear.forward  # whose source TorchScript compiles
        module.forward = types.MethodType(forward, module)  # a pickle of it is nn.Linear's own
        self._forwards.append((module, module.forward))

    def add_hook(self, param: nn.Parameter, sketch: Sketch) -> None:
        def hook(param: nn.Parameter) -> None:
            grad = param.grad
            if grad is None or grad is sketch.grad:  # the latter has sketched what was added to it
                return
            with phase("capture"):
                if sketch.grad is None:
                    sketch.add_gradient(grad)
                    param.grad = None
                else:
                    sketch.open(sketch.Y, sketch.Z)

        self._hooks.append(param.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        for module, forward in self._forwards:
            if vars(module).get("forward") is forward:  # a later optimizer's stays
                del module.forward
        for hook in self._hooks:
            hook.remove()
        self._forwards, self._hooks = [], []
