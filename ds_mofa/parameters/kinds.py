"""What a parameter is to the module that holds it: the weight of a linear map, an embedding, or something else.

It is told by classes and never by names: a linear map is what torch or transformers define as one. Of a bare parameter
nobody can say how it is used, so AdamW trains it unless ``include`` names it.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ds_mofa.parameters import experts
from ds_mofa.parameters.shapes import full_shape

__all__ = [
    "Slot",
    "is_convolution",
    "is_embedding",
    "is_linear_map",
    "is_transposed",
    "other_kind",
    "slots_of",
]

Slot = tuple[nn.Module, str]  # a module, and the name of a parameter of its own

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def slots_of(model: nn.Module) -> dict[nn.Parameter, list[Slot]]:
    """Where the model holds each parameter. A parametrized one is held by the module that computes with it too."""
    slots: dict[nn.Parameter, list[Slot]] = defaultdict(list)
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                slots[param].append((module, name))
        for name, computed in _parametrized(module):
            for param in computed.parameters(recurse=False):
                slots[param].append((module, name))
    return slots


def _parametrized(module: nn.Module) -> list[tuple[str, ParametrizationList]]:
    lists = module._modules.get("parametrizations")
    named = lists.items() if isinstance(lists, nn.ModuleDict) else ()
    return [(name, one) for name, one in named if isinstance(one, ParametrizationList)]


def is_linear_map(param: nn.Parameter, slots: Iterable[Slot]) -> bool:
    """Whether a 2-D parameter is the weight of a linear map."""
    return any(_is_weight(param, module, name) for module, name in slots)


def _is_weight(param: nn.Parameter, module: nn.Module, name: str) -> bool:
    if isinstance(module, nn.Linear):
        # weight_norm and pruning of old keep the weight under another name, and a part of it (m, 1) beside it.
        own = name == "weight" and name in module._parameters
        return own or full_shape(param) == (module.out_features, module.in_features)
    if isinstance(module, nn.MultiheadAttention):
        return name in _ATTENTION
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return name.startswith("weight_")
    return is_transposed(module) and name == "weight"


def is_convolution(slots: Iterable[Slot]) -> bool:
    return any(isinstance(module, nn.modules.conv._ConvNd) for module, _ in slots)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module computes x W: by its class, which is there if anybody has made one; stacked experts say it."""
    if experts.holds_experts(module):
        return experts.is_transposed(module)
    transposed = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return transposed is not None and isinstance(module, transposed)


def is_embedding(slots: Iterable[Slot]) -> bool:
    """Whether rows of the parameter are looked up: by torch's classes, and by those named like them (I-BERT's)."""
    return any(
        isinstance(module, nn.Embedding | nn.EmbeddingBag)
        or name == "weight"
        and "Embedding" in type(module).__name__
        and not isinstance(module, nn.Linear)
        for module, name in slots
    )


def other_kind(param: nn.Parameter, name: str, slots: Iterable[Slot]) -> str:
    """What a parameter is that is no matrix, whatever its size: words for the table."""
    holders = [module for module, _ in slots]
    dims = len(full_shape(param))
    if dims == 2:
        if name.rpartition(".")[2].endswith("bias"):
            return "stacked biases"
        return f"2-D in {type(holders[0]).__name__}, of no known linear map"
    if is_convolution(slots) and dims > 2:
        return "convolution"
    if dims == 3:
        return f"3-D in {type(holders[0]).__name__}, of no known experts"
    return "not 2-D"
