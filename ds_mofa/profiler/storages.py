"""Pieces of memory with their birth and death, and the tracker that finds them by watching the operators.

It is what a CPU and fake tensors are measured with; on a GPU PyTorch's allocator keeps the same history
(:mod:`ds_mofa.profiler.measure.history`). ``torch.distributed._tools.MemTracker`` watches operators too, but it keeps
figures by module rather than a history, takes one iteration, and is ten times slower.
"""

import dataclasses
import time
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["FOREVER", "Allocation", "StorageTracker"]

FOREVER = 1 << 62


@dataclasses.dataclass(eq=False)
class Allocation:
    """One piece of memory.

    Attributes:
        address: of its first byte.
        size: bytes.
        born: nanoseconds since the epoch, or 0 where it was there before the history began.
        died: likewise, or ``FOREVER`` where it was still there at the end.
        stack: where it was allocated, innermost first; empty where that was not recorded.
        category: what it is, once :func:`ds_mofa.profiler.measure.curve.label` has said.
        owner: whether an inventory knew it; otherwise its category is that of the phase of its birth.
    """

    address: int
    size: int
    born: int
    died: int = FOREVER
    stack: tuple[str, ...] = ()
    category: str = ""
    owner: bool = False


class StorageTracker(TorchDispatchMode):
    """The same history, from watching the operators: for CPUs and fake tensors.

    A storage is born when an operator first gives it out, and dies with its last tensor. Storages of ``ignored`` were
    there before.

    Args:
        ignored: tensors that are not to be counted.
        clock: nanoseconds; a counter where nothing takes time.
    """

    def __init__(self, ignored: Iterable[Tensor] = (), clock: Callable[[], int] = time.time_ns):
        super().__init__()
        self.allocations: list[Allocation] = []
        self.clock = clock
        self._open: dict[int, tuple[weakref.ref, Allocation]] = {}
        self.live = 0  # bytes
        self.peak = 0
        for tensor in ignored:
            self._add(tensor, None)
        self.allocations, self.live, self.peak = [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, func)
        return result

    def _add(self, tensor: Tensor, func) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._open or not storage.nbytes():
            return
        address = key if isinstance(tensor, torch._subclasses.FakeTensor) else storage.data_ptr()
        origin = () if func is None else (f"{func} -> {_describe(tensor)}",)
        one = Allocation(address, storage.nbytes(), self.clock() if func is not None else 0, stack=origin)
        counted = func is not None

        def gone(_, key=key, one=one, counted=counted):
            self._open.pop(key, None)
            one.died = self.clock()
            self.live -= one.size if counted else 0

        self._open[key] = (weakref.ref(storage, gone), one)
        self.allocations.append(one)
        self.live += one.size
        self.peak = max(self.peak, self.live)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
