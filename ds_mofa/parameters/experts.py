"""Stacked experts: which modules of transformers hold them, in which parameters, and which of these cannot be trained."""

import enum
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ds_mofa.options import OptionError
from ds_mofa.parameters.shapes import full_shape

__all__ = ["Kind", "holds_experts", "is_experts", "is_transposed", "kind_of", "refuse", "weights_of"]

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_READ = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate", "down_proj")
_TRAINED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Kind(enum.Enum):
    """How a module computes its experts.

    REGISTERED: by a function of transformers' registry of experts functions, from hidden states, indices and weights.
    SORTED: from rows that are sorted by expert, and how many each has.
    BATCHED: Llama 4's, every expert on all tokens.
    """

    REGISTERED = "registered"
    SORTED = "sorted"
    BATCHED = "batched"


# Of transformers' classes with a forward of their own: how, whether (E, in, out), and in which parameters.
_OTHERS: dict[str, tuple[Kind, bool, tuple[str, ...]]] = {
    "JetMoeParallelExperts": (Kind.SORTED, False, ("weight",)),
    "AriaGroupedExpertsGemm": (Kind.SORTED, True, ("weight",)),
    "Llama4TextExperts": (Kind.BATCHED, True, ("gate_up_proj", "down_proj")),
}


def kind_of(module: nn.Module) -> Kind | None:
    """How a module computes its experts; None where it holds none. One of the registry is told by what such a function
    reads of it.
    """
    if all(hasattr(module, name) for name in _READ) and hasattr(type(module).forward, "__wrapped__"):
        return Kind.REGISTERED
    other = _other(module)
    return None if other is None else other[0]


def _other(module: nn.Module) -> tuple[Kind, bool, tuple[str, ...]] | None:
    base: Any
    for base in type(module).__mro__:  # fully_shard makes a class of its own
        if base.__module__.startswith("transformers.models.") and base.__name__ in _OTHERS:
            return _OTHERS[base.__name__] if type(module).forward is base.forward else None
    return None


def holds_experts(module: nn.Module) -> bool:
    return kind_of(module) is not None


def is_transposed(module: Any) -> bool:
    """Whether its experts are stored (E, in, out)."""
    other = _other(module)
    return bool(module.is_transposed) if other is None else other[1]


def weights_of(module: nn.Module) -> tuple[str, ...]:
    """Names of its parameters that are stacked experts, whether it has them or not."""
    kind = kind_of(module)
    if kind is None or kind is Kind.REGISTERED:
        return _WEIGHTS if kind else ()
    other = _other(module)
    return () if other is None else other[2]


def is_experts(param: nn.Parameter, slots: Iterable[tuple[nn.Module, str]]) -> bool:
    """Whether a 3-D parameter (E, m, n) is the weights of E linear maps, each of some of the tokens."""
    return any(name in weights_of(module) for module, name in slots)


def refuse(model: nn.Module) -> None:
    """
    Raises:
        OptionError: experts of the model are quantised, cut up by expert parallelism, or computed by something else.
    """
    for name, module in model.named_modules():
        if "Experts" in type(module).__name__:
            _refuse_quantised(name, module)
            _refuse_liger(name, module)
        if kind_of(module) is Kind.REGISTERED:
            _refuse_parallel(name, module)
        elif any(map(holds_experts, module.children())):
            _refuse_kernel(name, module)


def _refuse_quantised(name: str, module: nn.Module) -> None:
    dtypes = {param.dtype for key, param in module.named_parameters(recurse=False) if key in _WEIGHTS}
    if dtypes - set(_TRAINED):
        raise OptionError(
            f"the experts of {name!r} are quantised ({', '.join(map(str, dtypes))}), of which no weight can be trained: load "
            "the model without it (for GPT-OSS, quantization_config=Mxfp4Config(dequantize=True))"
        )


def _refuse_liger(name: str, module: nn.Module) -> None:
    """Of experts that liger-kernel has put its forward, or its class, in the place of."""
    forward = vars(module).get("forward", type(module).forward)
    if forward.__module__.startswith("liger_kernel."):
        raise OptionError(
            f"{name!r} computes its experts by liger-kernel, whose kernel forms their whole gradients. Keep its other layers "
            'alone: {"swiglu": false} as liger_kernel_config, or apply_liger_kernel_to_...(swiglu=False)'
        )


def _refuse_parallel(name: str, module: nn.Module) -> None:
    for key, param in module.named_parameters(recurse=False):
        if key in _WEIGHTS and full_shape(param)[0] != module.num_experts:
            raise OptionError(
                f"{name}.{key} holds {full_shape(param)[0]} of the {module.num_experts} experts: expert parallelism is not "
                "served. Leave enable_expert_parallel out, and shard the model with ZeRO-3 or fully_shard"
            )


def _refuse_kernel(name: str, module: nn.Module) -> None:
    """Of a block that ``use_kernels`` has given another forward, which computes its experts itself."""
    other = vars(module).get("forward")
    kernel = getattr(type(module), "kernel_layer_name", None)
    replaced = other is not None and getattr(other, "__func__", None) is not type(module).forward
    if replaced and kernel is not None and not hasattr(module, "_old_forward"):  # Accelerate's
        raise OptionError(
            f"{name!r} computes its experts by the kernel {kernel!r}, past whatever takes their "
            "gradients: load the model with use_kernels=False"
        )
