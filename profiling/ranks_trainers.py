"""Torch's own loops on several ranks: DDP, and FSDP2 with its shards on some or all of them (HSDP)."""

import contextlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ds_mofa.profiler.setting import RunSetting
from ds_mofa.profiler.sharding import mesh_of, shard
from profiling.trainers import Materializer, TorchTrainer, build_model

__all__ = ["DDPTrainer", "FSDP2Trainer"]


def join(device: torch.device) -> None:
    """The ranks that torchrun has started; a run of one rank needs none to start it."""
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)


class _RanksTrainer(TorchTrainer):
    def versions(self) -> dict[str, Any]:
        return {"world_size": dist.get_world_size()}


class DDPTrainer(_RanksTrainer):
    """Gradients are views of DDP's buckets, and are reduced with the last micro-batch.

    They are set to zero and not to None, or autograd would allocate all of them once more in the micro-batches before. Where a
    micro-batch is a graph there is no DDP: what has captured it takes the mean.
    """

    def __init__(self, setting: RunSetting, device: torch.device):
        join(device)
        super().__init__(setting, device)
        if not setting.graphed:
            ids = [device] if device.type == "cuda" else None
            self.model = DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)
        self._count = 0

    def accumulate(self, ids: Tensor) -> Tensor:
        self._count = (self._count + 1) % self.micro_batches
        last = self._count == 0
        if self._graphed is not None:
            with contextlib.nullcontext() if last else self._graphed.no_sync():
                return super().accumulate(ids)
        self.model.require_backward_grad_sync = last  # what its no_sync() sets
        return super().accumulate(ids)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


class FSDP2Trainer(_RanksTrainer):
    """Every decoder layer is sharded, and the model with what is left; gradients are reduced in every micro-batch.

    No rank ever holds the whole model: each module gets its weights right before it is cut.
    """

    def __init__(self, setting: RunSetting, device: torch.device):
        join(device)
        model = build_model(setting, torch.device("meta"))
        shard(model, mesh_of(setting, device.type), setting, Materializer(model, setting, device))
        self._take(model, setting, device)
        self._gathered, self._count = setting.gathered, 0

    def accumulate(self, ids: Tensor) -> Tensor:
        # Until the last micro-batch of a step: torch's AdamW would leave the gathered copies as they were.
        if self._gathered:
            self._count = (self._count + 1) % self.micro_batches
            self.model.set_reshard_after_backward(self._count == 0)
        return super().accumulate(ids)
