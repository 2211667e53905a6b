"""Ways to use a weight in a forward pass. Of each, the sketches must be those of the gradient that autograd computes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["WAYS", "Zoo", "inputs"]


class Doubled(nn.Embedding):
    """By the forward of the class below, as Gemma's."""

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


class Zoo(nn.Module):
    """Two linears, two that share a weight, a parameter of its own, an embedding and its head, and a norm. ``way`` says how
    they are used.
    """

    INCLUDE = ["^free$", "embed"]  # a bare one, and an embedding with its head: matrices by the option alone

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.t1, self.t2 = nn.Linear(16, 16), nn.Linear(16, 16)
        self.t2.weight = self.t1.weight
        self.free = nn.Parameter(0.2 * torch.randn(16, 16))
        self.embed, self.head = Doubled(20, 16, padding_idx=2), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, way: str) -> Tensor:
        """x: (6, 5, 16). Returns a scalar loss."""
        y = WAYS[way](self, x)
        return y if y.ndim == 0 else y.square().mean()


def inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _checkpointed(net: Zoo, x: Tensor, **how) -> Tensor:
    return checkpoint(lambda y: net.b(net.a(y).relu()), x.clone().requires_grad_(), **how)


def _nested(net: Zoo, x: Tensor) -> Tensor:
    def inner(y):
        return checkpoint(net.b, y, use_reentrant=False)

    return checkpoint(lambda y: inner(net.a(y).relu()), x.clone().requires_grad_(), use_reentrant=False)


def _saved_on_cpu(net: Zoo, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return net.b(net.a(x).relu())


def _partly_without_grad(net: Zoo, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = net.a(x).relu()
    return net.b(hidden)


def _through_autograd_grad(net: Zoo, x: Tensor) -> Tensor:
    """An adversarial example: the first gradient is for the input, and must leave nothing behind."""
    x = x.clone().requires_grad_()
    (towards,) = torch.autograd.grad(net.b(net.a(x).relu()).square().mean(), x)
    return net.b(net.a(x.detach() + 0.1 * towards.sign()).relu())


def _through_partial_backward(net: Zoo, x: Tensor) -> Tensor:
    y = x.clone().requires_grad_()
    net.b(net.a(y).relu()).square().mean().backward(inputs=[y])
    return net.b(net.a(x + y.grad).relu())


def _tokens(x: Tensor) -> Tensor:
    """(6, 5): ids below 16, so that four rows never come."""
    return x.argmax(-1)


def _embedding_checkpointed(net: Zoo, x: Tensor) -> Tensor:
    return checkpoint(lambda y: net.t1(y + net.embed(_tokens(x))), x.clone().requires_grad_(), use_reentrant=False)


def _in_place(act: Callable[[Tensor], Tensor]) -> Callable[[Zoo, Tensor], Tensor]:
    return lambda net, x: net.b(act(net.a(x)))


WAYS: dict[str, Callable[[Zoo, Tensor], Tensor]] = {
    "one after the other": lambda net, x: net.b(net.a(x).relu()),
    "a vector": lambda net, x: net.b(net.a(x[0, 0]).relu()),
    "four dimensions": lambda net, x: net.b(net.a(x[None]).relu()),
    "an empty batch besides": lambda net, x: torch.cat([net.b(net.a(x[:0])), net.b(net.a(x).relu())]),
    "an expanded input": lambda net, x: net.b(net.a(x[:1].expand(6, 5, 16)).relu()),
    "a transposed input": lambda net, x: net.b(net.a(x.transpose(0, 1)).relu()),
    "a strided input": lambda net, x: net.b(net.a(x[:, ::2]).relu()),
    "an input with a gradient": lambda net, x: net.b(net.a(x.clone().requires_grad_()).relu()),
    "an expanded output gradient": lambda net, x: net.b(net.a(x).relu()).sum(0, keepdim=True).expand(3, 5, 16),
    "by its module and by F.linear": lambda net, x: F.linear(net.a(x).relu(), net.b.weight) + net.b(net.a(x)),
    "by matmul alone": lambda net, x: (x @ net.a.weight.T).relu() @ net.b.weight.T,
    "a slice": lambda net, x: F.linear(net.a(x).relu(), net.b.weight[:7], net.b.bias[:7]),
    "an L2 penalty": lambda net, x: net.b(net.a(x).relu()).mean() + 3 * net.a.weight.square().sum(),
    "a penalty before the use": lambda net, x: 3 * net.a.weight.square().sum() + net.b(net.a(x).relu()).mean(),
    "one weight in two modules": lambda net, x: net.t1(net.t2(x).relu()),
    "one module twice": lambda net, x: net.t1(net.t1(x).relu()),
    "a parameter of its own": lambda net, x: net.t1(x) @ net.free,
    "checkpointed, not reentrant": lambda net, x: _checkpointed(net, x, use_reentrant=False),
    "checkpointed, reentrant": lambda net, x: _checkpointed(net, x, use_reentrant=True),
    "checkpointed twice": _nested,
    "an activation in place": _in_place(torch.relu_),
    "a product in place": _in_place(lambda y: y.mul_(0.5)),
    "a sum in place": lambda net, x: net.t1(x).add_(x),
    "dropout in place": _in_place(lambda y: F.dropout(y, 0.0, True, True)),
    "a detached weight": lambda net, x: F.linear(net.a(x).relu(), net.b.weight.detach()) + net.t1(x),
    "partly without gradients": _partly_without_grad,
    "large values": lambda net, x: net.b(net.a(1e3 * x).relu()),
    "a masked weight": lambda net, x: F.linear(x, torch.where(net.a.weight > 0, net.a.weight, 0.1 * net.a.weight)),
    "an embedding": lambda net, x: net.t1(net.embed(_tokens(x))),
    "an embedding twice": lambda net, x: net.embed(_tokens(x)) + net.embed(_tokens(-x)),
    "an embedding that is the head": lambda net, x: net.head(net.t1(net.embed(_tokens(x)))),
    "an embedding, checkpointed": _embedding_checkpointed,
    "an embedding by F.embedding": lambda net, x: F.embedding(_tokens(x), net.embed.weight) + net.embed(_tokens(-x)),
    "under vmap": lambda net, x: torch.vmap(lambda y: F.linear(y, net.a.weight))(x),
    "a module under vmap": lambda net, x: torch.vmap(net.a)(x),
    "activations saved on the host": _saved_on_cpu,
    "after autograd.grad of the input": _through_autograd_grad,
    "after a backward to the input": _through_partial_backward,
}
