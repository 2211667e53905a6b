"""Triton kernels for NVIDIA GPUs, each beside a plain PyTorch twin that says what it must compute."""

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["triton_serves", "stages_that_fit"]


def triton_serves(tensor: Tensor) -> bool:
    """Whether the Triton kernels take work on this tensor: it is on a GPU and not float64."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "ds_mofa runs on this GPU without its Triton kernels, several times slower: pip install triton", stacklevel=3
    )
    return False


def stages_that_fit(device: torch.device, bytes_per_stage: int, *, other: int = 0, most: int = 4) -> int:
    """How many stages of a pipeline the device's shared memory holds: ``most`` on data-centre GPUs, less on others."""
    return max(1, min(most, (_shared_memory(device) - other) // bytes_per_stage))


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one thread block may have."""
    if device.type != "cuda":  # Triton's interpreter
        return 1 << 18
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub has not all of them
    return properties.shared_memory_per_block_optin
