"""The collectives of a step, over one process group."""

import torch
import torch.distributed as dist
from torch import Tensor

from ds_mofa.partition.layout import SketchSegment

__all__ = ["Exchange"]


class Exchange:
    """The collectives of one step over one process group; without a group, one process alone.

    Args:
        group: whose ranks train replicas or shards of one model.
        mean_scale: what takes a sum over the group's ranks to the mean over the global batch.

    Attributes:
        rank: of this process among the owners.
        world_size: number of owners.
        processes: whose sketches are added up.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, mean_scale: float = 1.0):
        self.group, self._mean_scale = group, mean_scale
        self.rank = dist.get_rank(group) if group is not None else 0
        self.processes = self.world_size = dist.get_world_size(group) if group is not None else 1

    @property
    def mean_scale(self) -> float:
        return self._mean_scale

    def reduce_scatter(self, flat: Tensor, segment: int) -> SketchSegment:
        """The sum over ranks of this rank's segment of ``flat``, as a new tensor."""
        if self.world_size == 1:
            return SketchSegment(flat.clone())
        out = flat.new_empty(segment)
        dist.reduce_scatter_tensor(out, flat, group=self.group)
        return SketchSegment(out)

    def all_gather(self, flat: Tensor, segment: int) -> None:
        """Fill ``flat`` with every rank's segment; this rank's own lies in it already."""
        if self.world_size > 1:
            dist.all_gather_into_tensor(flat, flat.narrow(0, self.rank * segment, segment).clone(), group=self.group)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, part: Tensor) -> list[Tensor] | None:
        """Every rank's ``part``, on the group's rank 0; None elsewhere."""
        if self.group is None or self.world_size == 1:
            return [part]
        parts = [torch.empty_like(part) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(part, parts, dst=dist.get_global_rank(self.group, 0), group=self.group)
        return parts

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """``source`` is a rank of the group."""
        if self.group is not None and self.world_size > 1:
            dist.broadcast(tensor, dist.get_global_rank(self.group, source), group=self.group)
