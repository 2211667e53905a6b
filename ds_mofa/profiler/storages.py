"""Pieces of memory with their birth and death, and the tracker that finds them by watching the operators.

It is what a CPU and fake tensors are measured with; on a GPU PyTorch's allocator keeps the same history
(:mod:`ds_mofa.profiler.measure.history`). ``torch.distributed._tools.MemTracker`` watches operators too, but it keeps
figures by module rather than a history, takes one iteration, and is ten times slower.
"""

import dataclasses
import sys
import time
import types
import unittest.mock
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ds_mofa.kernels.int8 import Int8Weight
from ds_mofa.optimizers.gradient import SketchedGradient

__all__ = ["FOREVER", "Allocation", "StorageTracker", "of_fsdp2", "with_memory"]

FOREVER = 1 << 62

_FSDP2 = "torch/distributed/fsdp/_fully_shard/"


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


def of_fsdp2(one: Allocation) -> bool:
    """Whether FSDP2's own lines have allocated it: gathered weights, what they travel in, reductions."""
    return any(_FSDP2 in frame for frame in one.stack)


def with_memory(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, or those in it that have memory: a DTensor's, a collective's result, a weight's eight bits and exponents;
    none of a sketched gradient.
    """
    if is_traceable_wrapper_subclass(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:
            if isinstance(part, Tensor):  # a DTensor's mesh is among them
                yield from with_memory(part)
    elif not isinstance(tensor, SketchedGradient):
        yield tensor


class StorageTracker(TorchDispatchMode):
    """The same history, from watching the operators: for CPUs and fake tensors.

    A storage is born when an operator first gives it out, and dies with its last tensor, or when it is resized, which is
    how FSDP2 lets go of gathered weights; with another size it is born again. Storages of ``ignored`` were there before.
    A stack is the operator, and FSDP2's lines where they called it, or all of Python's.

    Args:
        stacks: all of Python's lines.
        ignored: tensors that are not to be counted.
        clock: nanoseconds; a counter where nothing takes time.
    """

    def __init__(self, ignored: Iterable[Tensor] = (), clock: Callable[[], int] = time.time_ns, stacks: bool = False):
        super().__init__()
        self._frames = _all_frames if stacks else _fsdp2_frames
        self.allocations: list[Allocation] = []
        self.clock = clock
        self._open: dict[int, tuple[weakref.ref, Allocation, bool]] = {}
        self.live = 0  # bytes
        self.peak = 0
        for tensor in ignored:
            self._add(tensor, None)
        self.allocations, self.live, self.peak = [], 0, 0

    def __enter__(self):
        tracker, resize = self, torch.UntypedStorage.resize_

        def resized(storage, size):
            result = resize(storage, size)
            tracker._resized(storage)
            return result

        self._patch = unittest.mock.patch.object(torch.UntypedStorage, "resize_", resized)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, (DTensor, Int8Weight)) for kind in types):
            return NotImplemented  # it comes again with what is inside
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, func)
        return result

    def _add(self, tensor: Tensor, func) -> None:
        for part in with_memory(tensor):
            self._add_storage(part, func)

    def _add_storage(self, tensor: Tensor, func) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._open or not storage.nbytes():
            return
        origin = () if func is None else (f"{func} -> {_describe(tensor)}", *self._frames())
        address = id(storage) if isinstance(tensor, torch._subclasses.FakeTensor) else storage.data_ptr()
        self._born(storage, Allocation(address, storage.nbytes(), 0, stack=origin), counted=func is not None)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._open:
            self._died(id(storage))
        if storage.nbytes():
            address = id(storage) if storage.device.type == "meta" else storage.data_ptr()
            one = Allocation(address, storage.nbytes(), 0, stack=("resize_", *self._frames()))
            self._born(storage, one, counted=True)

    def _born(self, storage: torch.UntypedStorage, one: Allocation, counted: bool) -> None:
        key = id(storage)
        one.born = self.clock() if counted else 0
        self._open[key] = (weakref.ref(storage, lambda _: self._died(key)), one, counted)
        self.allocations.append(one)
        self.live += one.size if counted else 0
        self.peak = max(self.peak, self.live)

    def _died(self, key: int) -> None:
        if key in self._open:  # not so where it was resized to nothing before
            _, one, counted = self._open.pop(key)
            one.died = self.clock()
            self.live -= one.size if counted else 0


def _fsdp2_frames() -> Iterator[str]:
    """Those of FSDP2 on the stack, innermost first, as the allocator's history writes them."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if _FSDP2 in frame.f_code.co_filename:
            yield f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back


def _all_frames() -> Iterator[str]:
    """Python's stack, innermost first, without this file's lines, as the allocator's history writes it."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
