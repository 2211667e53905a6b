"""The toy under fully_shard, DDP or in one process, trained by a loop of one's own; no DeepSpeed."""

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from engines import mofasgd
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toys import Routed, Toy, batches, micro_batches
from training import mean_over_ranks, toy

__all__ = ["DATA", "Seen", "built", "full", "lessons", "run"]


def lessons(steps: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Global batches of twelve sequences, which four processes can share out too."""
    return [(tokens[:12], targets[:12]) for tokens, targets in batches(steps, seed)]


DATA = lessons(6)


class Seen(Toy):
    """With a buffer that a checkpoint holds too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.randint(1 << 40, (2,)))


class SeenRouted(Routed):
    """:class:`Seen` with stacked experts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.randint(1 << 40, (2,)))


def built(engine: str, *, seed: int = 0, dtype: str = "float32", experts: bool = False, **options: Any) -> tuple:
    """The model, as ``engine`` has it, and its optimizer.

    Args:
        engine: ``"fsdp2"``, ``"hsdp"`` (two shards of each replica), ``"ddp"`` or ``"one"``, a process that trains alone.
        seed: of the first weights.
        experts: whether the model has stacked experts.
    """
    whole = toy(SeenRouted if experts else Seen, seed=seed).to(getattr(torch, dtype))
    if engine == "one":
        return whole, mofasgd(whole, **options)
    if engine == "ddp":
        optimizer = mofasgd(whole, **options)
        return DistributedDataParallel(whole), optimizer
    world = dist.get_world_size()
    shape, names = ((world,), ("shards",)) if engine == "fsdp2" else ((world // 2, 2), ("replicas", "shards"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    parts = (whole.feed, whole.moe) if experts else (whole.up, whole.down)
    for part in (*parts, whole):
        fully_shard(part, mesh=mesh)
    return whole, mofasgd(whole, **options)


def run(model: nn.Module, optimizer: Any, data: Iterable, clip: float = 0.5) -> list[float]:
    """Steps on global batches; the mean loss before each."""
    losses = []
    for batch in data:
        (part,) = micro_batches(batch, dist.get_rank(), dist.get_world_size(), 1)
        loss = model(*part)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss.detach().clone()))
    return losses


def full(tensor: Tensor) -> Tensor:
    """A copy of all of it. Collective for a DTensor."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()
