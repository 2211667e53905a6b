"""``weights: "int8"``: which matrices of a model are kept in eight bits, and what cannot be."""

from collections.abc import Sequence

import torch
from torch import nn

from ds_mofa.kernels.int8 import Int8Weight
from ds_mofa.options import OptionError
from ds_mofa.parameters import Matrix, is_sharded, local_part
from ds_mofa.weights import int8

__all__ = ["check_still_kept", "keep_in_eight_bits"]


def keep_in_eight_bits(model: nn.Module, matrices: Sequence[Matrix]) -> str:
    """Do so, in place, and say what has been done.

    Raises:
        OptionError: the weights are fp16, or in parts; or not one has rows of whole groups. Nothing has changed.
    """
    for matrix in matrices:
        _check(matrix)
    served = [m.param for m in matrices if _is_kept(m.param) or int8.serves(m.full_shape, m.param.dtype)]
    if not served:
        raise OptionError(
            f"weights='int8' keeps matrices whose rows have a multiple of {int8.GROUP} weights, and of {len(matrices)} none "
            "has: leave it out"
        )
    int8.put_in(model, [param for param in served if not _is_kept(param)])
    numel = sum(param.numel() for param in served)
    left = len(matrices) - len(served)
    other = f"; {left} whose rows are no multiple of {int8.GROUP} stay as they are" if left else ""
    taken = numel + numel // int8.GROUP
    return f"{len(served)} matrices, {numel / 1e6:,.1f}M weights, are kept in eight bits, {taken / 1e9:.3f} GB{other}"


def check_still_kept(matrices: Sequence[Matrix]) -> None:
    """Before the first use of an optimizer that has put them there.

    Raises:
        OptionError: something has put ordinary weights in their place.
    """
    for matrix in matrices:
        if int8.serves(matrix.full_shape, matrix.param.dtype) and not _is_kept(matrix.param):
            raise OptionError(
                f"{matrix.name!r} was put into eight bits when the optimizer was built, and is an ordinary weight now: what "
                "shards the model has loaded weights anew (load_state_dict(assign=True); in Accelerate "
                "fsdp_cpu_ram_efficient_loading). Switch that off, or leave weights='int8' out"
            )


def _is_kept(param: nn.Parameter) -> bool:
    return isinstance(local_part(param), Int8Weight)


def _check(matrix: Matrix) -> None:
    param = matrix.param
    if _is_kept(param):
        return
    if is_sharded(param) or hasattr(param, "ds_tensor"):
        raise OptionError(
            f"weights='int8' needs whole weights to begin with, and {matrix.name!r} is in parts already: call to_int8 of the "
            "optimizer's class on the model before fully_shard; under DeepSpeed use ZeRO stage 0, 1 or 2"
        )
    if param.dtype == torch.float16:
        raise OptionError(
            f"weights='int8' reads as bf16 or fp32, and {matrix.name!r} is fp16, whose range is too small: load the model in "
            "bf16"
        )
