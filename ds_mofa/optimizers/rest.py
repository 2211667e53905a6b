"""The AdamW of a plain loop, which trains what is no matrix."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ds_mofa.adamw.eight_bit import AdamW8bit
from ds_mofa.optimizers.binding import say
from ds_mofa.options import OptimizerOptions

__all__ = ["adamw_of", "beside", "fuse"]


def fuse(groups: Iterable[dict[str, Any]], device: torch.device) -> None:
    """As :func:`adamw_of` does where the device is known from the start."""
    for group in groups if device.type == "cuda" else ():
        if "fused" in group:  # of torch's AdamW
            group["fused"] = True  # one pass instead of ten on the host too, where CPUOffloadPolicy keeps parameters


def adamw_of(groups: list[dict[str, Any]], options: OptimizerOptions, device: torch.device) -> torch.optim.Optimizer:
    """An AdamW for param groups that lie on ``device``, maybe only so far."""
    if options.adamw_states == "8bit":
        adamw = AdamW8bit(groups, options)
        say(f"ds_mofa: {adamw.summary()}")
        return adamw
    beta1, beta2 = options.adamw_betas
    return torch.optim.AdamW(
        groups,
        betas=(beta1, beta2),
        eps=options.adamw_eps,
        fused=True if device.type == "cuda" else None,  # a third of the time of the default there
    )


@contextlib.contextmanager
def beside(adamw: torch.optim.Optimizer, joined: contextlib.ExitStack) -> Iterator[None]:
    """Within: what is launched runs beside what the current stream gets next, until ``joined`` ends.

    AdamW waits for the device's memory and the factors for their small products, so each leaves the other room. Only for
    torch's fused one, which needs no memory of its own, and from its second step on: the first makes the moments, which are to
    come from the same blocks as all else.

    Args:
        adamw: whose step is taken within.
        joined: from its end on, the current stream waits for it.
    """
    fused = type(adamw) is torch.optim.AdamW and all(group.get("fused") for group in adamw.param_groups)
    device = next((param.device for group in adamw.param_groups for param in group["params"]), None)
    if not (fused and adamw.state and device is not None and device.type == "cuda"):
        yield
        return
    own, current = _stream(device), torch.cuda.current_stream(device)
    own.wait_stream(current)
    joined.callback(current.wait_stream, own)
    with torch.cuda.stream(own):
        yield


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
