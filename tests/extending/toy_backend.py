"""A backend from outside of the package: two threads of one process are the ranks, and each holds half of every matrix.

Each rank trains a model of its own, whose weights are views into one memory that both share; a rank writes its half of
the elements, and the barrier of the next collective lets the other see them.
"""

import threading

import torch
from torch import Tensor

from ds_mofa.kernels.shard import Shard
from ds_mofa.parameters import Matrix
from ds_mofa.partition.exchange import Exchange
from ds_mofa.partition.layout import SketchSegment
from ds_mofa.step.backend import Backend

__all__ = ["ThreadBackend", "ThreadExchange", "World"]


class World:
    """What the threads share."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: list[Tensor | None] = [None] * size


class ThreadExchange(Exchange):
    """The collectives of :class:`ds_mofa.partition.exchange.Exchange`, through shared memory."""

    def __init__(self, world: World, rank: int):
        super().__init__(mean_scale=1 / world.size)
        self.rank, self.world_size, self._world = rank, world.size, world

    def _all(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor."""
        self._world.slots[self.rank] = tensor
        self._world.barrier.wait()
        found = [slot.clone() for slot in self._world.slots]
        self._world.barrier.wait()
        return found

    def reduce_scatter(self, flat: Tensor, segment: int) -> SketchSegment:
        return SketchSegment(sum(self._all(flat)).narrow(0, self.rank * segment, segment).clone())

    def all_gather(self, flat: Tensor, segment: int) -> None:
        for rank, part in enumerate(self._all(flat.narrow(0, self.rank * segment, segment))):
            flat.narrow(0, rank * segment, segment).copy_(part)

    def sum(self, values: Tensor) -> Tensor:
        return values.copy_(sum(self._all(values)))

    def gather(self, part: Tensor) -> list[Tensor] | None:
        parts = self._all(part)
        return parts if self.rank == 0 else None

    def broadcast(self, tensor: Tensor, source: int) -> None:
        tensor.copy_(self._all(tensor)[source])


class ThreadBackend(Backend):
    """One rank's view."""

    host = gathered = None
    device = torch.device("cpu")

    def __init__(self, world: World, rank: int):
        self.exchange = ThreadExchange(world, rank)

    def shard_of(self, matrix: Matrix) -> Shard:
        flat = matrix.param.data.view(-1)
        size = -(-flat.numel() // self.exchange.world_size)  # a half may begin inside a row
        start = min(flat.numel(), self.exchange.rank * size)
        return Shard(flat[start : start + size], start)
