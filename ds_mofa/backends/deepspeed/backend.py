"""DeepSpeed's engine as the step sees it: its process group, where it keeps weights, how it gathers a released one."""

from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

from ds_mofa.backends.deepspeed.matrices import shard_of
from ds_mofa.capture.sink import Gathered
from ds_mofa.kernels.shard import Shard
from ds_mofa.parameters import Matrix
from ds_mofa.partition.exchange import Exchange
from ds_mofa.step.backend import Backend
from ds_mofa.weights.staging import HostMemory

__all__ = ["EngineBackend", "GatheredWeight"]


class EngineBackend(Backend):
    """A DeepSpeed engine at every ZeRO stage. ``norms`` serves stage 0, where every rank has whole gradients; at the others
    DeepSpeed clips.
    """

    def __init__(self, engine: Any):
        self.exchange = _exchange(engine)
        self.device: torch.device = engine.device
        self.host = HostMemory(engine.zero_offload_optimizer().pin_memory) if engine.zero_cpu_offload() else None
        self.gathered: Gathered | None = GatheredWeight if engine.zero_optimization_partition_weights() else None

    def shard_of(self, matrix: Matrix) -> Shard:
        return shard_of(matrix)


class GatheredWeight:
    """The whole of a stage-3 weight: as it stands where the module hooks have gathered it, else gathered here."""

    def __init__(self, weight: Tensor):
        self._weight: Any = weight  # with DeepSpeed's methods, where stage 3 has partitioned it
        self._here = getattr(weight, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE

    def __enter__(self) -> Tensor:
        if self._here:
            self._weight.all_gather()
        return self._weight

    def __exit__(self, *_: object) -> None:
        if self._here:
            self._weight.partition()


def _exchange(engine: Any) -> Exchange:
    group = engine.seq_data_parallel_group
    world_size = dist.get_world_size(group)
    # Ranks of one sequence-parallel group hold parts of the same sequences: their gradients add up.
    # Stage 3's reduce-scatter, which is its default, divides them by all ranks all the same, and the matrices by what
    # AdamW's part is divided by: one norm clips both.
    divided = engine.zero_optimization_partition_weights() and engine.zero_reduce_scatter()
    parts = 1 if divided else engine.sequence_parallel_size
    mean_scale = parts / world_size if engine.gradient_average else 1.0
    return Exchange(group if world_size > 1 else None, mean_scale)
