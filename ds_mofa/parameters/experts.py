"""Stacked experts: which modules of transformers hold them, and which of these cannot be trained."""

from collections.abc import Iterable

import torch
from torch import nn

from ds_mofa.options import OptionError
from ds_mofa.parameters.shapes import full_shape

__all__ = ["WEIGHTS", "holds_experts", "is_experts", "refuse"]

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_READ = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate", "down_proj")
_TRAINED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def holds_experts(module: nn.Module) -> bool:
    """Whether it is one of transformers' modules of stacked experts, which are computed by a function of its registry: by
    what that function reads of a module.
    """
    return all(hasattr(module, name) for name in _READ) and hasattr(type(module).forward, "__wrapped__")


def is_experts(param: nn.Parameter, slots: Iterable[tuple[nn.Module, str]]) -> bool:
    """Whether a 3-D parameter (E, m, n) is the weights of E linear maps, each of some of the tokens."""
    return any(name in WEIGHTS and holds_experts(module) for module, name in slots)


def refuse(model: nn.Module) -> None:
    """
    Raises:
        OptionError: experts of the model are quantised, cut up by expert parallelism, or computed by something else.
    """
    for name, module in model.named_modules():
        if "Experts" in type(module).__name__:
            _refuse_quantised(name, module)
        if holds_experts(module):
            _refuse_parallel(name, module)
        elif any(map(holds_experts, module.children())):
            _refuse_kernel(name, module)


def _refuse_quantised(name: str, module: nn.Module) -> None:
    dtypes = {param.dtype for key, param in module.named_parameters(recurse=False) if key in WEIGHTS}
    if dtypes - set(_TRAINED):
        raise OptionError(
            f"the experts of {name!r} are quantised ({', '.join(map(str, dtypes))}), of which no weight can be trained: load "
            "the model without it (for GPT-OSS, quantization_config=Mxfp4Config(dequantize=True))"
        )


def _refuse_parallel(name: str, module: nn.Module) -> None:
    for key, param in module.named_parameters(recurse=False):
        if key in WEIGHTS and full_shape(param)[0] != module.num_experts:
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
