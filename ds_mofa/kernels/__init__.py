"""Triton kernels for NVIDIA GPUs, each beside a plain PyTorch twin that says what it must compute."""

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "launches_on",
    "multiprocessors",
    "on",
    "on_its_device",
    "stages_that_fit",
    "tile_that_fits",
    "triton_serves",
]

_LEAST = 16  # a side of a tile: tensor cores multiply no less


def triton_serves(tensor: Tensor) -> bool:
    """Whether the Triton kernels take work on this tensor: it is on a GPU and not float64."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and _has_triton()


def launches_on(tensor: Tensor) -> bool:
    """:func:`triton_serves`, of work that is done now: what is traced is the compiler's to fuse, and tensors of other classes
    may have no memory.
    """
    return triton_serves(tensor) and type(tensor) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


_HERE = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Within, this device is the current one. Triton launches there, wherever its arguments are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: within, the device of the first argument that is a tensor is the current one; see :func:`on`."""

    @functools.wraps(launch)
    def launched(*args: Any, **kwargs: Any) -> Any:
        with on(next(one.device for one in args if isinstance(one, Tensor))):
            return launch(*args, **kwargs)

    return launched


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


def tile_that_fits(device: torch.device, tile: tuple[int, int], needs: Callable[[int, int], int]) -> tuple[int, int]:
    """The tile given, or the largest below it that the device's shared memory holds: factors may be wide.

    Args:
        tile: its two sides, powers of 2; the second is halved first.
        needs: bytes for a tile of these sides.

    Raises:
        ValueError: not even the smallest fits.
    """
    first, second = tile
    while needs(first, second) > _shared_memory(device):
        if first <= _LEAST and second <= _LEAST:
            raise ValueError(
                f"rank and explore make factors of more columns than the {_shared_memory(device)} bytes of this GPU's shared "
                "memory hold. Lower explore or rank."
            )
        first, second = (first, second // 2) if second > _LEAST else (first // 2, second)
    return first, second


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many of them the device has, each of which runs a program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of it that one thread block may have."""
    if device.type != "cuda":  # Triton's interpreter
        return 1 << 18
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub has not all of them
    return properties.shared_memory_per_block_optin
