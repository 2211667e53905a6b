"""How much of a GPU's arithmetic a run uses: model FLOPs utilisation (MFU; Chowdhery et al. 2022, arXiv 2204.02311, B).

Counted is what a forward and a full backward need, whatever is executed: recomputing a layer adds nothing to it, and an
optimizer that forms no weight gradients loses nothing of it. So it compares tokens/s over models and GPUs, and is no more.
"""

import math
from typing import Any

from ds_mofa.parameters import full_shape
from ds_mofa.parameters.experts import is_experts
from ds_mofa.parameters.kinds import is_linear_map, slots_of

__all__ = ["flops_per_token", "peak_flops"]

# Dense 16-bit FLOP/s by NVIDIA's data sheets, by what the driver calls the card begins with.
_PEAKS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak_flops(card: str) -> float | None:
    """What a card computes a second in 16 bits; None of one that is not known."""
    return next((peak for name, peak in _PEAKS.items() if card.startswith(name)), None)


def flops_per_token(model: Any, tokens: int) -> float:
    """FLOPs of training on one token: 6 N + 12 L H Q T.

    N counts the weights of linear maps that a token meets, the output head's too: of stacked experts those that the router
    chooses. L layers of H heads of Q attend to T tokens: that a causal mask leaves half of these out, and a window more, is not
    counted, and layers of linear attention are left out.

    Args:
        model: of transformers', whole, sharded or in partitions.
        tokens: T, of a sequence.
    """
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    head = model.get_output_embeddings()
    met = 0.0
    for param, slots in slots_of(model).items():
        shape = full_shape(param)  # of stage 3's too, which hold nothing
        if len(shape) == 3 and is_experts(param, slots):
            met += math.prod(shape) * chosen / shape[0]
        elif len(shape) == 2 and (is_linear_map(param, slots) or head is not None and param is head.weight):
            met += math.prod(shape)
    return 6 * met + 12 * _attention_width(config) * tokens


def _attention_width(config: Any) -> int:
    """L H Q: of all heads in all layers that attend to the tokens before. 0 where a config names no heads."""
    heads = getattr(config, "num_attention_heads", None) or 0
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return layers * heads * width
