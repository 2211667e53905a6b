"""Random numbers that depend on what they are for, never on what was drawn before."""

import torch

from ds_mofa.kernels.random_bits import Rounding, rounding_key

__all__ = ["keyed_generator"]


def keyed_generator(seed: int, step: int, index: int, device: torch.device) -> torch.Generator:
    """A generator on ``device`` for matrix ``index`` in this step: a resumed run draws what an unbroken one draws."""
    return torch.Generator(device).manual_seed(rounding_key(Rounding(False, seed, step), index))
