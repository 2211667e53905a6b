"""Triton kernels for NVIDIA GPUs, each beside a plain PyTorch twin that says what it must compute."""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

__all__ = ["triton_serves"]


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
