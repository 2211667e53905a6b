"""A capture from outside of the package: modules that keep their weight transposed, y = x W with W (inputs x outputs).

G = x^T dy, so the two take each other's part in ``add_linear``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_mofa.capture.autograd import wanted
from ds_mofa.capture.sink import Gathered, Sink
from ds_mofa.parameters import Matrix

__all__ = ["Transposed", "TransposedCapture"]


class Transposed(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink = sink
        return x @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight.mT if ctx.needs_input_grad[0] else None
        asked = wanted(ctx.next_functions[1][0])
        if asked is None:  # autograd.grad wants the gradient itself
            return dx, x.flatten(0, -2).mT @ dy.flatten(0, -2), None
        if asked:
            ctx.sink.add_linear(dy, x)
        return dx, None, None


class TransposedCapture:
    """A :class:`ds_mofa.capture.sink.Capture`."""

    def serves(self, module: nn.Module, matrix: Matrix) -> bool:
        return type(module) is Transposed and module.weight is matrix.param

    def attach(self, module: nn.Module, matrix: Matrix, sink: Sink, gathered: Gathered | None) -> Callable[[], None]:
        def forward(x: Tensor) -> Tensor:
            return _Product.apply(x, module.weight, sink)

        module.forward = forward
        return lambda: vars(module).pop("forward", None)
