"""Processes that each hold the whole model: the mean of gradients where no DistributedDataParallel takes it."""

import gc
from collections import defaultdict
from collections.abc import Container, Sequence
from itertools import compress

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Replicated", "wrappers_of"]

_LARGE = 2**20  # elements: a gradient of fewer goes with others in one message


class Replicated:
    """The same parameters on every process of a group.

    Args:
        group: those processes; None: all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group, self._processes = group, dist.get_world_size(group)

    def broadcast(self, params: Sequence[Tensor]) -> None:
        """Give every process the values of the group's first, in place. Collective. ``params``: of any shape and dtype."""
        first = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        for param in params:
            dist.broadcast(param.detach(), first, group=self._group)

    @torch.no_grad()
    def average(self, params: Sequence[Tensor]) -> None:
        """Put the mean over processes into each ``.grad``; where a process has none, zeros go into the mean, and where all
        have none it stays so. Collective; the host waits for the device once.

        Args:
            params: the same on every process, in one order, on one device; of any shape and floating dtype, in which the sum
                is taken, of gradients that were divided by the number of processes first.
        """
        if not params:
            return
        grads = [param.grad for param in params]
        present = torch.tensor([grad is not None for grad in grads], dtype=torch.int32, device=params[0].device)
        dist.all_reduce(present, op=dist.ReduceOp.MAX, group=self._group)
        some = [bool(anywhere) for anywhere in present.tolist()]
        kinds: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for param in compress(params, some):
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            kinds[param.grad.device, param.grad.dtype].append(param.grad)
        for alike in kinds.values():
            torch._foreach_div_(alike, self._processes)
            small = []
            for grad in alike:
                if grad.numel() >= _LARGE and grad.is_contiguous():
                    dist.all_reduce(grad, group=self._group)
                else:
                    small.append(grad)
            if small:
                joined = torch.cat([grad.reshape(-1) for grad in small])
                dist.all_reduce(joined, group=self._group)
                parts = joined.split([grad.numel() for grad in small])
                torch._foreach_copy_(small, [part.view_as(grad) for part, grad in zip(parts, small)])


def wrappers_of(params: Container[Tensor]) -> list[DistributedDataParallel]:
    """Every living DistributedDataParallel around a module that holds one of these."""
    return [
        found
        for found in gc.get_objects()
        if issubclass(type(found), DistributedDataParallel)
        and any(param in params for param in found.module.parameters())
    ]
