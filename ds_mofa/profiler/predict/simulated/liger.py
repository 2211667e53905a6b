"""Stand-ins for liger-kernel's fused operators: what they keep and allocate, and the same numbers, without a GPU.

Triton's kernels run on neither a CPU nor fake tensors. Here each is an operator that writes into tensors made for it,
so that a tracker of storages sees what liger-kernel 0.8 allocates around its kernels, and nothing of how a CPU computes
what is in them:

RMSNorm saves its input and one fp32 number a token, and turns the gradient that it gets into the one it passes on.
Rotary embedding turns queries and keys in place, and their gradients likewise. SwiGLU saves gate and up, and writes
their gradients over them. The output head and the loss are one: logits exist for a few tokens at a time, and both
gradients, the head's whole one included, are computed in forward and kept until backward.
"""

import contextlib
import functools
import sys
import types
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["MODELS", "WITH_EXPERTS", "fused"]

# Of transformers' model types, those whose layers liger-kernel replaces by exactly these operators.
MODELS = ("llama", "mistral", "qwen2", "qwen3")
# Likewise but for SwiGLU, which is their experts' and left out beside an optimizer that captures them.
WITH_EXPERTS = ("qwen3_moe",)

_IGNORED = -100  # label of a token without a loss
_PROGRAMS = 132  # RMSNorm's backward sums the weight's gradient in a row for each multiprocessor: an H100's or H200's


@contextlib.contextmanager
def fused(model: nn.Module, loss: bool = True) -> Iterator[None]:
    """Within: ``model``, one of :data:`MODELS` or :data:`WITH_EXPERTS`, computes with the fused operators; with ``loss`` that
    of the loss too, and then it gives out the loss alone.
    """
    config: Any = model.config
    gated = config.model_type not in WITH_EXPERTS
    with contextlib.ExitStack() as stack:
        replace = functools.partial(_replace, stack)
        replace(_home_of(model, "apply_rotary_pos_emb"), "apply_rotary_pos_emb", _rotate)
        if loss:
            replace(model, "forward", types.MethodType(_loss_only, model))
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                replace(module, "forward", types.MethodType(_norm, module))
            elif gated and hasattr(module, "gate_proj"):
                replace(module, "forward", types.MethodType(_gated, module))
        yield


def _home_of(model: nn.Module, function: str) -> types.ModuleType:
    """The file of the model's class: what fully_shard makes of it is a class of another file."""
    files = [sys.modules[one.__module__] for one in type(model).__mro__]
    return next(file for file in files if hasattr(file, function))


def _replace(stack: contextlib.ExitStack, owner, name: str, value) -> None:
    stack.enter_context(unittest.mock.patch.object(owner, name, value))


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _gated(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(_SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _Rotary.apply(q, k, cos, sin)


def _loss_only(model: Any, input_ids: Tensor, labels: Tensor) -> types.SimpleNamespace:
    hidden = getattr(model, model.base_model_prefix)(input_ids=input_ids).last_hidden_state
    targets = nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:].contiguous().view(-1)
    loss = _LinearCrossEntropy.apply(hidden.view(-1, hidden.shape[-1]), model.lm_head.weight, targets)
    return types.SimpleNamespace(loss=loss)


# ---------------------------------------------------------------------- the operators, as autograd sees them


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # x: [..., width]
        y, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        normalize(x, weight, eps, y, rstd)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        rows = weight.new_empty((_PROGRAMS, weight.numel()), dtype=torch.float32)
        normalize_backward(dy, x, weight, rstd, rows)
        return dy, rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate, up):
        out = torch.empty_like(gate)
        swiglu(gate, up, out)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        swiglu_backward(dout, gate, up)
        return gate, up


class _Rotary(Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):  # q, k: [batch, heads, tokens, width], views of [batch, tokens, heads, width]
        ctx.save_for_backward(cos, sin)
        q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()
        rotate(q, k, cos, sin, False)
        return q.transpose(1, 2), k.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        dq, dk = dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous()
        rotate(dq, dk, *ctx.saved_tensors, True)
        return dq.transpose(1, 2), dk.transpose(1, 2), None, None


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx, x, weight, targets):  # x: [tokens, width], weight: [vocabulary, width], targets: [tokens]
        tokens, width = x.shape
        dx, losses = torch.zeros_like(x), x.new_zeros(tokens, dtype=torch.float32)
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        chunk = _chunk(tokens, width, weight.shape[0])
        buffer = x.new_empty((chunk, weight.shape[0]))
        for start in range(0, tokens, chunk):
            here = slice(start, min(start + chunk, tokens))
            logits = buffer[: here.stop - start]
            torch.mm(x[here], weight.t(), out=logits)
            cross_entropy(logits, targets[here], targets, losses[here])
            torch.mm(logits, weight, out=dx[here])  # they are the logits' gradient now
            if dweight is not None:
                torch.addmm(dweight, logits.t(), x[here], out=dweight)
        ctx.save_for_backward(dx, dweight)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        return dx.mul_(dloss), None if dweight is None else dweight.mul_(dloss), None


def _chunk(tokens: int, width: int, vocabulary: int) -> int:
    """Tokens whose logits exist at a time: about as many numbers as the input has, rounded up to a power of two."""
    parts = -(-vocabulary // width)
    return min(1 << (-(-tokens // parts) - 1).bit_length(), tokens)


# ---------------------------------------------------------------------- the kernels: they write, and allocate nothing


def _kernel(*written: str) -> Callable:
    """Make a function an operator of its own that writes into its arguments ``written``; fake ones it leaves alone."""

    def register(function):
        operator = torch.library.custom_op(f"ds_mofa_liger::{function.__name__}", function, mutates_args=written)
        operator.register_fake(lambda *_: None)
        return operator

    return register


@_kernel("y", "rstd")
def normalize(x: Tensor, weight: Tensor, eps: float, y: Tensor, rstd: Tensor) -> None:
    rstd.copy_(torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps))
    y.copy_((x.float() * rstd).to(x.dtype) * weight)


@_kernel("dy", "rows")
def normalize_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, rows: Tensor) -> None:
    unit = x.float() * rstd
    rows.zero_()
    rows[0] = (dy * unit.to(x.dtype)).float().flatten(0, -2).sum(0)
    scaled = (dy * weight).float()
    dy.copy_(rstd * (scaled - unit * (scaled * unit).mean(-1, keepdim=True)))


@_kernel("out")
def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    out.copy_(nn.functional.silu(gate.float()).to(up.dtype) * up)


@_kernel("gate", "up")
def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> None:
    sigmoid = gate.float().sigmoid()
    activated = gate * sigmoid
    dgate = dout * up * (sigmoid + activated * (1 - sigmoid))
    up.copy_(dout * activated)
    gate.copy_(dgate)


@_kernel("q", "k")
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    # Both halves of cos and sin are the same, so the transposed rotation is the one by the opposite angle.
    sin = -sin if back else sin
    for x in (q, k):  # [batch, tokens, heads, width]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        x.copy_(x * cos.unsqueeze(2) + turned * sin.unsqueeze(2))


@_kernel("logits", "losses")
def cross_entropy(logits: Tensor, targets: Tensor, all_targets: Tensor, losses: Tensor) -> None:
    """The mean loss's share of each token, and over the logits [tokens, vocabulary] their gradient."""
    share = (targets != _IGNORED) / (all_targets != _IGNORED).sum()
    target = targets.clamp(min=0).unsqueeze(1)
    log_probability = logits.float().log_softmax(-1)
    losses.copy_(-log_probability.gather(1, target).squeeze(1) * share)
    gradient = log_probability.exp()
    gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
    logits.copy_(gradient * share.unsqueeze(1))
