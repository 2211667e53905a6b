"""The fused head: an output head and its cross-entropy by chunks of tokens, so that no tensor holds all logits.

Loss and gradients are computed together, in the forward pass, where the softmax is at hand and ZeRO stage 3 has the
weight gathered; the backward only scales them. A head that MoFaSGD trains never has a weight gradient, not even a
chunk's: its sketches Y = dlogits^T (X V) and Z = X^T (dlogits U) add up chunk by chunk. One that AdamW trains gets its
gradient added up in place.

**Memory**, for N tokens, a weight of m x n and b bytes a number: at most :func:`peak_bytes`, that is

- a chunk of logits: b m for each of its tokens, at most ``LOGITS_BYTES`` (one token's, if that is more);
- where no Triton kernel takes the softmax, two fp32 blocks of ``BLOCK_BYTES`` (one token's logits, if that is more);
- what the backward hands on: dX, b N n, and b m n of weight gradient, or 4 r (m + n) of sketches, or nothing.

LLaMA-8B at 1024 tokens, in bf16, on a GPU: 1.33 GB with AdamW on the head, 0.29 GB with the head a matrix of rank 16.

**Precision.** The softmax is fp32. Gradients are of the sum over tokens, over a number in [1/2, 1) that makes what is
left for the backward a power of two: in 16 bits they are rounded where unfused ones are. In fp16 they enter the
products 1024 times as large, for small probabilities would else be subnormal, and leave them as they are. In 16 bits a
weight gradient is rounded once a chunk, which is why chunks are large: up to 1046 tokens of a vocabulary of 128 k are
one. On a problem of 1024 tokens and 8192 x 512 weights in bf16 its distance from float64 is 0.17 % in one chunk, as it
is unfused, 0.20 % in two, 0.26 % in four, 0.32 % in eight and 0.47 % in 32. Sketches are fp32 and know no such error.
"""

import contextlib
import dataclasses
import functools
import inspect
import types
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_mofa.capture.autograd import OURS, plain_linear, wanted
from ds_mofa.capture.products import add_product
from ds_mofa.capture.sketch import Sketch
from ds_mofa.kernels.cross_entropy import BLOCK_BYTES, cross_entropy
from ds_mofa.kernels.int8 import whole
from ds_mofa.options import OptionError

__all__ = ["LOGITS_BYTES", "FusedHead", "FusedLoss", "peak_bytes"]

LOGITS_BYTES = 1 << 28

_HALF_LIFT = 1024.0
# Names under which configs of transformers say that the model changes the logits before the loss.
_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def peak_bytes(
    tokens: int, m: int, n: int, *, itemsize: int, weight_gradient: int = 0, rank: int = 0, kernel: bool = False
) -> int:
    """Most bytes that forward and backward of a fused head hold beside its input and its weight; one that is kept in eight bits
    is widened as a whole for that long, m n ``itemsize`` more.

    Args:
        tokens: N, of a micro-batch.
        m: rows of the weight, the vocabulary.
        n: its columns, the width.
        itemsize: bytes of a number of the activations.
        weight_gradient: bytes of a number of the weight's gradient; 0 where there is none.
        rank: of the sketches, where they are taken; else 0.
        kernel: whether a Triton kernel takes the softmax.
    """
    chunk = min(tokens, max(1, LOGITS_BYTES // (m * itemsize)))
    block = 0 if kernel else min(chunk, max(1, BLOCK_BYTES // (m * 4)))
    temporary = chunk * m * itemsize + 2 * block * m * 4 + chunk * rank * itemsize
    kept = tokens * n * itemsize + m * n * weight_gradient + 4 * rank * (m + n)
    return temporary + kept + 64 * tokens + 16 * m  # targets, row sums, a bias


class FusedLoss(torch.autograd.Function):
    """The cross-entropy of x W^T + b, summed over tokens and divided by ``items``."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        items: Tensor,
        ignore_index: int,
        sketch: Sketch | None,
    ) -> Tensor:
        """
        Args:
            x: (N, n).
            weight: (m, n).
            bias: (m,).
            targets: (N,), below m or ``ignore_index``.
            items: a scalar tensor.
            sketch: takes the place of a weight gradient.

        Returns:
            A scalar in fp32 (float64 for float64).
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        lift = _HALF_LIFT if x.dtype == torch.float16 else 1.0
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        W, b = whole(weight).to(x.dtype), None if bias is None else bias.to(x.dtype)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
        dw = torch.zeros_like(weight) if need_weight and sketch is None else None
        db = torch.zeros(len(weight), dtype=wide, device=x.device) if need_bias else None
        own = sketch.emptied() if need_weight and sketch is not None else None

        items = items.to(wide)
        share = torch.frexp(items.clamp(min=1)).mantissa  # share / items is a power of two
        valid = targets != ignore_index
        targets, factors = torch.where(valid, targets, 0), valid * (lift / share)
        losses = torch.empty(len(x), dtype=wide, device=x.device)
        for part in _chunks(len(x), LOGITS_BYTES // (len(W) * x.element_size())):
            logits = plain_linear(x[part], W, b)
            losses[part] = cross_entropy(logits, targets[part], factors[part] if any(ctx.needs_input_grad) else None)
            if dx is not None:
                torch.addmm(dx[part], logits, W, beta=0, alpha=1 / lift, out=dx[part])
            if dw is not None:
                add_product(dw, logits.mT, x[part], alpha=1 / lift)
            if own is not None:
                own.add_linear(x[part], logits)
            if db is not None:
                db.add_(logits.sum(0, dtype=wide))
            del logits
        ctx.gradients, ctx.sketch = (dx, dw, db, own), sketch
        ctx.rest, ctx.lift, ctx.bias_dtype = share / items.clamp(min=1), lift, None if bias is None else bias.dtype
        return torch.where(valid, losses, 0).sum() / items

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the fused head's gradients are gone after one backward: run the forward again")
        (dx, dw, db, own), ctx.gradients = ctx.gradients, None
        scale = grad * ctx.rest
        for gradient in (dx, dw):
            if gradient is not None:
                _scale(gradient, scale)
        if db is not None:
            db = db.mul_(scale / ctx.lift).to(ctx.bias_dtype)
        if own is not None:
            asked = wanted(ctx.next_functions[1][0])
            if asked is None:
                raise RuntimeError(
                    "autograd.grad asks for the gradient of the output head, and the fused head of a matrix has sketches "
                    'alone: set "fused_head": false'
                )
            if asked:
                ctx.sketch.add_sums(own, scale / ctx.lift)
        return dx, dw, db, None, None, None, None


def _scale(tensor: Tensor, scale: Tensor) -> None:
    """tensor *= scale, a scalar that the tensor's dtype may not hold: its product is taken in the scale's."""
    for part in tensor.view(-1).split(BLOCK_BYTES // scale.element_size()):  # a CPU makes a wide copy of what it scales
        part.mul_(scale.view(1))


def _chunks(count: int, most: int) -> list[slice]:
    """0 to ``count`` in as few parts as there can be of ``most``, or of 1, of nearly one size."""
    parts = -(-count // max(1, most))
    return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


@dataclasses.dataclass
class _Call:
    """One forward of the model with labels: what it was given, and what became of it.

    Attributes:
        items: what the summed loss is divided by; None for the number of labels.
        loss: the head's; None before.
        version: of that tensor, which changing it in place counts up.
        handed_out: by the loss function.
    """

    labels: Tensor
    shift_labels: Tensor | None
    items: Tensor | int | None
    ignore_index: int
    loss: Tensor | None = None
    version: int = 0
    handed_out: bool = False

    def targets(self) -> Tensor:
        """The tokens to predict, (..., S): as ``transformers.loss.loss_utils.ForCausalLMLoss`` has them."""
        if self.shift_labels is not None:
            return self.shift_labels
        return nn.functional.pad(self.labels, (0, 1), value=self.ignore_index)[..., 1:]


class FusedHead:
    """Has a model of Hugging Face's compute its loss in its head.

    In training mode, in a forward with ``labels``, the head returns the loss instead of logits, the model's
    ``loss_function`` hands it out, and the ``logits`` of the output are None. Any other forward is the model's own.

    Args:
        model: what the optimizer trains: the model with the head, or a module around it.

    Raises:
        OptionError: the model is not of a kind that this can be done with.
    """

    def __init__(self, model: nn.Module):
        self._model, self._head = _model_and_head(model)
        self._arguments = list(inspect.signature(self._model.forward).parameters)
        self._sketch: Sketch | None = None
        self._call: _Call | None = None
        self._warned = False
        self._undo = contextlib.ExitStack()

    def is_held_by(self, modules: Iterable[nn.Module]) -> bool:
        """Whether the head is one of these modules."""
        return any(module is self._head for module in modules)

    def attach(self, sketch: Sketch | None) -> None:
        """Change the model.

        Args:
            sketch: of the head's weight, where that is a matrix whose linears are captured.
        """
        self._sketch = sketch
        # Functions, not methods of this object, which a deep copy of the model would copy as well.
        self._replace(self._head, "forward", types.MethodType(_head_forward(self), self._head))
        self._replace(self._model, "_loss_function", _loss_function(self, self._model.loss_function))
        before, after = _hooks(self)
        self._undo.callback(self._model.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._undo.callback(self._model.register_forward_hook(after).remove)

    def remove(self) -> None:
        """Put the model back as it was before :meth:`attach`."""
        self._undo.close()

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:
        before = vars(module).get(name)
        setattr(module, name, value)

        def undo() -> None:
            if vars(module).get(name) is not value:
                return  # someone's who came later
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)

        self._undo.callback(undo)

    def loss(self, x: Tensor, call: _Call) -> Tensor:
        """The loss of ``call`` from the head's input. x: (..., S, n)."""
        targets = call.targets().to(x.device)
        if x.shape[:-1] != targets.shape:
            raise OptionError(
                f"fused_head: the head got {tuple(x.shape[:-1])} tokens and {tuple(targets.shape)} labels: leave "
                "logits_to_keep out where there are labels"
            )
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        inputs = [x.reshape(-1, x.shape[-1]), self._head.weight, self._head.bias]
        if not torch.is_grad_enabled():
            inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
        targets, items = targets.reshape(-1), call.items
        items = (targets != call.ignore_index).sum() if items is None else torch.as_tensor(items, device=x.device)
        # A hook on the weight is one more who wants the gradient itself.
        sketch = None if self._head.weight._backward_hooks else self._sketch
        with torch.autocast(device, enabled=False):
            return FusedLoss.apply(*inputs, targets, items, call.ignore_index, sketch)

    # ------------------------------------------------------------------ a forward, in its order

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """The model's forward begins."""
        given = dict(zip(self._arguments, args)) | kwargs
        labels = given.get("labels")
        self._call = None
        if self._model.training and labels is not None:
            items, ignore_index = given.get("num_items_in_batch"), given.get("ignore_index", -100)
            self._call = _Call(labels, given.get("shift_labels"), items, ignore_index)

    @torch.compiler.disable
    def compute(self, x: Tensor) -> Tensor | None:
        """What the head returns instead of logits; None where it must return these."""
        call = self._call
        if call is None or call.loss is not None:
            return None
        call.loss = self.loss(x, call)
        call.version = call.loss._version
        return call.loss

    @torch.compiler.disable
    def hand_out(self, logits: Tensor, labels: Tensor | None) -> bool:
        """Whether what the loss function was given as ``logits`` is the loss already."""
        call = self._call
        if call is None or call.loss is None:
            return False
        same = logits.data_ptr() == call.loss.data_ptr() and logits._version == call.version
        if not same or labels is None or labels.data_ptr() != call.labels.data_ptr():
            raise OptionError(
                f"fused_head: {type(self._model).__name__} changes its {'labels' if same else 'logits'} between its "
                'head and its loss, which computing the loss in the head leaves out: set "fused_head": false'
            )
        call.handed_out = True
        return True

    def end(self, output: Any) -> Any:
        """The model's forward has ended: its output, without the loss where logits were."""
        call, self._call = self._call, None
        if call is None:
            return output
        if call.loss is None:
            self._warn_of_detour()
            return output
        if not call.handed_out:
            raise OptionError(
                f"fused_head: {type(self._model).__name__} computes its loss without its loss_function, so it would "
                'take the fused loss for logits: set "fused_head": false'
            )
        if isinstance(output, Mapping):
            return type(output)(**{key: value for key, value in output.items() if key != "logits"})
        return (output[0], None, *output[2:])

    def _warn_of_detour(self) -> None:
        if not self._warned:
            warnings.warn(
                "ds_mofa: fused_head does nothing here: the model's forward has been replaced by one that does not "
                "call its output head (TRL's SFTTrainer and liger-kernel's fused_linear_cross_entropy do so)",
                stacklevel=2,
            )
        self._warned = True


def _head_forward(fused: FusedHead):
    head, before = fused._head, vars(fused._head).get("forward")

    def forward(self, x: Tensor) -> Tensor:
        if self is not head:  # a deep copy
            return nn.Linear.forward(self, x)
        loss = fused.compute(x)
        if loss is not None:
            return loss
        return nn.Linear.forward(self, x) if before is None else before(x)

    setattr(forward, OURS, True)
    return forward


def _loss_function(fused: FusedHead, before):
    @functools.wraps(before)
    def loss_function(logits, labels=None, *args, **kwargs):
        return logits if fused.hand_out(logits, labels) else before(logits, labels, *args, **kwargs)

    setattr(loss_function, OURS, True)
    return loss_function


def _hooks(fused: FusedHead):
    model = fused._model

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module is model:
            fused.begin(args, kwargs)

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        return fused.end(output) if module is model else output

    return before, after


def _model_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The model with an output head and a loss function, within ``model``, and that head."""
    for module in model.modules():
        kind = type(module)  # not the module: peft's wrappers pretend to have what they are around
        if hasattr(kind, "loss_function") and hasattr(kind, "get_output_embeddings"):
            causal: Any = module  # with Hugging Face's methods
            head = causal.get_output_embeddings()
            if head is not None:
                _check(module, head)
                return module, head
    raise OptionError(
        "fused_head needs a causal language model of Hugging Face's, with get_output_embeddings() and a "
        f'loss_function; {type(model).__name__} has none: set "fused_head": false'
    )


def _check(model: nn.Module, head: nn.Module) -> None:
    name = type(model).__name__
    before = model.loss_function
    if hasattr(before, OURS):
        raise OptionError(
            "fused_head: another optimizer has fused the head of this model: destroy its engine, or call its "
            "matrices.detach(), before another is built"
        )
    if type(head) is not nn.Linear or "forward" in vars(head) and not hasattr(head.forward, OURS):
        raise OptionError(
            f"fused_head needs an output head that is a plain nn.Linear; {name} has {type(head).__name__}, or "
            'something has replaced its forward: keep adapters and quantization off the head, or set "fused_head": false'
        )
    if getattr(before, "__name__", None) != "ForCausalLMLoss":
        raise OptionError(
            f"fused_head computes the loss ForCausalLMLoss, and {name} has {getattr(before, '__name__', before)}: set "
            '"fused_head": false'
        )
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for change in _CHANGES:
        if getattr(config, change, None) is not None:
            raise OptionError(
                f"fused_head: {name} changes its logits after the head ({change}={getattr(config, change)} in its "
                'config), which a loss computed in the head would leave out: set "fused_head": false'
            )
