"""The AdamW of a plain loop, which trains what is no matrix."""

from collections.abc import Iterable
from typing import Any

import torch

from ds_mofa.adamw.eight_bit import AdamW8bit
from ds_mofa.optimizers.binding import say
from ds_mofa.options import OptimizerOptions

__all__ = ["adamw_of", "fuse"]


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
