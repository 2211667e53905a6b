"""``weights: "int8"``: which matrices of a model are kept in eight bits, and what cannot be."""

from collections.abc import Sequence

import torch
from torch import nn

from ds_mofa.kernels.int8 import Int8Weight
from ds_mofa.options import OptionError
from ds_mofa.parameters import Matrix, is_sharded
from ds_mofa.weights import int8

__all__ = ["keep_in_eight_bits"]


def keep_in_eight_bits(model: nn.Module, matrices: Sequence[Matrix]) -> str:
    """Do so, in place, and say what has been done.

    Raises:
        OptionError: the weights are fp16, or in parts; or not one has rows of whole groups. Nothing has changed.
    """
    for matrix in matrices:
        _check(matrix)
    served = [matrix.param for matrix in matrices if int8.serves(matrix.full_shape, matrix.param.dtype)]
    if not served:
        raise OptionError(
            f"weights='int8' keeps matrices whose rows have a multiple of {int8.GROUP} weights, and of {len(matrices)} none "
            "has: leave it out"
        )
    int8.put_in(model, served)
    numel = sum(param.numel() for param in served)
    left = len(matrices) - len(served)
    other = f"; {left} whose rows are no multiple of {int8.GROUP} stay as they are" if left else ""
    taken = sum(param.codes.numel() + param.exponents.numel() for param in served if isinstance(param, Int8Weight))
    return f"{len(served)} matrices, {numel / 1e6:,.1f}M weights, are kept in eight bits, {taken / 1e9:.3f} GB{other}"


def _check(matrix: Matrix) -> None:
    param = matrix.param
    if is_sharded(param) or hasattr(param, "ds_tensor"):
        raise OptionError(
            f"weights='int8' needs whole weights, and {matrix.name!r} is in parts: leave it out under fully_shard and ZeRO "
            "stage 3, or use one process, DistributedDataParallel, or ZeRO stage 0, 1 or 2"
        )
    if param.dtype == torch.float16:
        raise OptionError(
            f"weights='int8' reads as bf16 or fp32, and {matrix.name!r} is fp16, whose range is too small: load the model in "
            "bf16"
        )
