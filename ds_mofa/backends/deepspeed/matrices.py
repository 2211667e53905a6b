"""A matrix as DeepSpeed meets it: marked, in shards, and answered for.

DeepSpeed keeps no fp32 copy, gradient or optimizer state of a matrix. Its accessors
(``deepspeed.utils.safe_get_full_fp32_param`` and the others of that module) get the weight itself, None for a
gradient or a state, and an error where they would set one.
"""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeGuard

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn

from ds_mofa.backends.deepspeed import bases
from ds_mofa.kernels.shard import Shard
from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.parameters import Matrix
from ds_mofa.step.backend import whole_matrix
from ds_mofa.weights.staging import HostMemory

__all__ = [
    "Stage3Accessors",
    "answer_for_whole",
    "forget",
    "is_matrix",
    "is_partitioned",
    "local_shard",
    "mark_matrices",
    "move_shards",
    "shard_of",
]

_MARK = "ds_mofa_matrix"
_ANSWERS = ("_hp_mapping", "get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad")


def mark_matrices(matrices: Iterable[Matrix]) -> None:
    """Let DeepSpeed's checkpoints and accessors tell a matrix from a parameter of its own."""
    for matrix in matrices:
        setattr(matrix.param, _MARK, True)


def is_matrix(param: nn.Parameter) -> bool:
    return getattr(param, _MARK, False)


def forget(matrices: Iterable[Matrix]) -> None:
    """Leave the parameters as they were before :func:`mark_matrices` and :func:`answer_for_whole`."""
    for matrix in matrices:
        for name in (_MARK, *_ANSWERS):
            vars(matrix.param).pop(name, None)


def shard_of(matrix: Matrix) -> Shard:
    """This rank's part of W: a flat range of the row-major parameter in stage 3, all of it in the others."""
    return local_shard(matrix.param) if is_partitioned(matrix.param) else whole_matrix(matrix)


def is_partitioned(param: nn.Parameter) -> TypeGuard[bases.Partitioned]:
    """Whether stage 3, or ``zero.Init``, has partitioned the parameter."""
    return hasattr(param, "ds_tensor")


def local_shard(param: bases.Partitioned) -> Shard:
    """This rank's part of a parameter that stage 3 partitions, without the padding."""
    start = dist.get_rank(param.ds_process_group) * param.ds_tensor.ds_numel
    length = max(0, min(param.ds_tensor.ds_numel, param.ds_numel - start))  # the rest is padding
    return Shard(param.ds_tensor.data.narrow(0, 0, length), min(start, param.ds_numel))


def move_shards(matrices: Iterable[Matrix], host: HostMemory) -> None:
    """Move to the host the shards of ``offload_param`` that lie on the GPU: a ``zero.Init`` that was not given the
    config has left them there, and DeepSpeed moves those of its own groups alone. What persists stays, as theirs does.
    """
    for matrix in matrices:
        assert is_partitioned(matrix.param)  # offload_param is stage 3's
        shard = matrix.param.ds_tensor
        if shard.device.type != "cpu" and not matrix.param.ds_persist:
            shard.data = host.zeros(shard.numel(), shard.dtype).copy_(shard)


def answer_for_whole(param: nn.Parameter, written: Callable[[], None]) -> None:
    """Stages 0 to 2, where DeepSpeed asks the parameter. ``written`` is called after a weight was set."""

    @torch.no_grad()
    def set_full(value: Tensor, optim_state_key: str | None = None) -> None:
        if optim_state_key is not None:
            _no_such(optim_state_key)
        param.copy_(value.view_as(param))
        written()

    asked: Any = param
    asked._hp_mapping = None
    asked.get_full_hp_param = lambda key=None: None if key is not None else param.detach().float().clone()
    asked.set_full_hp_param = set_full
    asked.get_full_hp_grad = lambda: None
    asked.set_full_hp_grad = lambda value: _no_such("gradient")


class Stage3Accessors(bases.Stage3):
    """Stage 3, where DeepSpeed asks its optimizer. "Local" is this rank's shard, without the padding."""

    mofa: MatrixOptimizer

    def get_full_hp_param(self, param, optim_state_key=None):
        if not is_matrix(param):
            return super().get_full_hp_param(param, optim_state_key)
        if optim_state_key is not None:
            return None
        with GatheredParameters([param]):
            return param.data.float().clone()

    def set_full_hp_param(self, value, param, optim_state_key=None):
        if not is_matrix(param):
            return super().set_full_hp_param(value, param, optim_state_key)
        if optim_state_key is not None:
            _no_such(optim_state_key)
        with GatheredParameters([param], modifier_rank=0):
            if dist.get_rank(param.ds_process_group) == 0:
                param.data.copy_(value.view_as(param))
        self.mofa.matrices.masters.refresh()

    def get_local_fp32_param(self, param, optim_state_key=None):
        if not is_matrix(param):
            return super().get_local_fp32_param(param, optim_state_key)
        return None if optim_state_key is not None else local_shard(param).flat.float().clone()

    def set_local_hp_param(self, value, param, optim_state_key=None):
        if not is_matrix(param):
            return super().set_local_hp_param(value, param, optim_state_key)
        if optim_state_key is not None:
            _no_such(optim_state_key)
        shard = local_shard(param).flat
        shard.copy_(value.flatten()[: shard.numel()])
        self.mofa.matrices.masters.refresh()

    def get_fp32_grad_for_param(self, param):
        return None if is_matrix(param) else super().get_fp32_grad_for_param(param)

    def set_fp32_grad_for_param(self, value, param):
        return _no_such("gradient") if is_matrix(param) else super().set_fp32_grad_for_param(value, param)

    def get_local_fp32_grad_for_param(self, param):
        return None if is_matrix(param) else super().get_local_fp32_grad_for_param(param)

    def set_local_grad_for_param(self, value, param):
        return _no_such("gradient") if is_matrix(param) else super().set_local_grad_for_param(value, param)


def _no_such(what: str) -> NoReturn:
    raise ValueError(
        f'a matrix has no {what} that could be set: name the parameter in "exclude" to have it trained by AdamW'
    )
