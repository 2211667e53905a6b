"""Whether a model keeps packed examples apart, measured: no list of names would stay right.

Packed examples lie in one row, told apart by their positions (and the lengths that TRL's collator adds). A model that
heeds neither lets an example see those before it, without an error: learned or relative positions, state-space layers
and convolutions often do.

The measure is a gradient: that of the second example's logits by the first one's embeddings. Where the examples are
kept apart it is exactly zero in any dtype, since masked attention has weights of exactly zero; rounding and the routing
of experts, which a comparison of logits would see, leave no trace in it. It depends on the layers and the kernels, not
on the weights. So it is taken on a *miniature*: the same class, config, attention kernel, dtype and device, with random
weights, a small vocabulary, and only as many layers as it takes to have one of each kind. For Llama-3.1-8B that is one
layer, 0.4 GB in bf16, whatever ZeRO does with the model itself.
"""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

_LENGTH = 8  # tokens of each of the two examples
_VOCABULARY = 64
_NUMBER = re.compile(r"_?(layer|block)_?(i|id|idx|index|num|number)?")  # what models call a layer's place in the stack
_WAY_OUT = "Leave out --packing (and --padding_free): padded batches keep examples apart in any model."


def packing_problem(
    model: PreTrainedModel, collator: Callable[[list[dict]], dict[str, Any]], device: torch.device
) -> str | None:
    """Why packed examples cannot be trained on; None where the model keeps them apart.

    Args:
        model: only its class, its config and the kinds of its layers count.
        collator: of the batches to come.
        device: that the model will train on.
    """
    name = type(model).__name__
    try:
        own, leak = measure(miniature(model, device), collator)
    except Exception as error:  # whatever an architecture raises that does not fit
        reason = (str(error).strip().splitlines() or [""])[0]
        return _unknown(name, f"a miniature of it ended with {type(error).__name__}: {reason}")
    if not 0 < own < math.inf or math.isnan(leak):
        return _unknown(name, f"a gradient by its input embeddings was {own:g}")
    if leak == 0:
        return None
    return (
        f"--packing: {name} (attention: {model.config._attn_implementation}) does not keep packed examples apart: the "
        f"second of two depends on the first, by {leak / own:.1e} of what it depends on itself. {_WAY_OUT}"
    )


def _unknown(name: str, why: str) -> str:
    return f"--packing: whether {name} keeps packed examples apart could not be measured ({why}). {_WAY_OUT}"


def miniature(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A model of the same class with a layer of each kind that there is, and random weights."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()  # the config itself, where it has no parts
    layers = _layers(_reader(model), text.num_hidden_layers)
    if layers is not None:
        _truncate(text, _prefix_with_all_kinds(layers))
    text.vocab_size, text.use_cache = min(text.vocab_size, _VOCABULARY), False
    for one in {id(one): one for one in (config, text)}.values():
        for special in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(one, special, None) is not None:
                setattr(one, special, 0)
    config._attn_implementation = model.config._attn_implementation
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with device, torch.random.fork_rng():
            small = type(model)(config)  # not from_config, which would cut it up under ZeRO-3
            small.init_weights()
    finally:
        torch.set_default_dtype(before)
    return small.train()


def measure(model: nn.Module, collator: Callable[[list[dict]], dict[str, Any]]) -> tuple[float, float]:
    """Largest gradients of the second of two packed examples' logits.

    Returns:
        (by its own embeddings, by those of the first example).
    """
    ids = (torch.arange(2 * _LENGTH) * 7 % (_VOCABULARY - 1) + 1).tolist()
    batch = collator([{"input_ids": ids, "labels": ids, "seq_lengths": [_LENGTH, _LENGTH]}])
    batch.pop("labels")
    device = next(model.parameters()).device
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    embedded = []

    def start_graph(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1] * 1.0  # not a leaf, which may be written in place

    handle = model.get_input_embeddings().register_forward_hook(start_graph)
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            logits = model(**batch, use_cache=False).logits[0, _LENGTH:].float()
            weights = torch.linspace(-1, 1, logits.numel(), device=device).view_as(logits).cos()
            (gradient,) = torch.autograd.grad((logits * weights).sum(), embedded[0])
    finally:
        handle.remove()
    first, second = gradient.view(2 * _LENGTH, -1).float().abs().split(_LENGTH)
    return second.max().item(), first.max().item()


def _reader(model: PreTrainedModel) -> nn.Module:
    """The part of the model that reads tokens: all of it, but in one that sees or hears too."""
    text = model.config.get_text_config()
    return next((module for module in model.modules() if getattr(module, "config", None) is text), model)


def _layers(model: nn.Module, count: int) -> nn.ModuleList | None:
    """The model's stack of layers."""
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return next(stacks, None)


def _prefix_with_all_kinds(layers: nn.ModuleList) -> int:
    """How many of the first layers it takes to have one of each kind."""
    kinds = [_kind(layer) for layer in layers]
    return 1 + max(kinds.index(kind) for kind in set(kinds))


def _kind(layer: nn.Module) -> tuple:
    """What a layer is made of, and its own settings (a window, a layer type), its number left out."""
    return tuple(
        (name, type(module), *((key, value) for key, value in sorted(vars(module).items()) if _is_setting(key, value)))
        for name, module in layer.named_modules()
    )


def _is_setting(key: str, value: Any) -> bool:
    return isinstance(value, str | bool | int | float) and not _NUMBER.fullmatch(key)


def _truncate(config: PretrainedConfig, layers: int) -> None:
    """Fewer layers, in the settings that hold one value for each of them too."""
    count = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(config, key, value[:layers])
    config.num_hidden_layers = layers
