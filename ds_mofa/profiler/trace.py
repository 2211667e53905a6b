"""Every allocation of a stretch of time with its birth and death, and what was alive at any moment of it.

On a GPU the history comes from PyTorch's allocator itself (``torch.cuda.memory._record_memory_history``). On a CPU, and
under fake tensors, :class:`StorageTracker` watches the operators. ``torch.distributed._tools.MemTracker`` does that
too, but it keeps figures by module rather than a history, takes one iteration, and is ten times slower.
"""

import bisect
import dataclasses
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_mofa.profiler.categories import IN_ALLOCATOR
from ds_mofa.profiler.inventory import Known

__all__ = ["Allocation", "CudaHistory", "Curve", "Span", "StorageTracker", "alive", "curve", "label", "new_gradients"]

FOREVER = 1 << 62
_GATHERING = "deepspeed/runtime/zero/partition_parameters.py"


@dataclasses.dataclass(eq=False)
class Allocation:
    """One piece of memory.

    Attributes:
        address: of its first byte.
        size: bytes.
        born: nanoseconds since the epoch, or 0 where it was there before the history began.
        died: likewise, or ``FOREVER`` where it was still there at the end.
        stack: where it was allocated, innermost first; empty where that was not recorded.
        category: what it is, once :func:`label` has said.
        owner: whether an inventory knew it; otherwise its category is that of the phase of its birth.
    """

    address: int
    size: int
    born: int
    died: int = FOREVER
    stack: tuple[str, ...] = ()
    category: str = ""
    owner: bool = False


class Span(NamedTuple):
    """A phase as it happened, times in nanoseconds since the epoch."""

    name: str
    start: int
    end: int


@dataclasses.dataclass
class Curve:
    """Bytes by category over time, at every change.

    Attributes:
        times: nanoseconds since the epoch.
        totals: bytes at each of them.
        peak_time: when the total was largest.
        peak: bytes by category then.
        rows: bytes by category at ``times``; those of :data:`IN_ALLOCATOR` and "unexplained".
    """

    times: list[int]
    totals: list[int]
    peak_time: int
    peak: dict[str, int]
    rows: list[tuple[int, ...]]


class CudaHistory:
    """The allocator's history of one device between :meth:`start` and :meth:`stop`.

    Args:
        device: whose.
        stacks: record where each allocation was made from Python; slower by some microseconds an allocation.
    """

    def __init__(self, device: torch.device, stacks: bool = False):
        self.device, self.stacks = device, stacks
        self.snapshot: dict[str, Any] | None = None

    def start(self) -> None:
        context = "all" if self.stacks else None
        torch.cuda.memory._record_memory_history("all", context=context, stacks="python", device=self.device)
        # The clocks are compared by one allocation of a size that nothing else has.
        self._marker = 12_345 * 512
        self._began = time.time_ns()
        del_me = torch.empty(self._marker, dtype=torch.uint8, device=self.device)
        self._ended = time.time_ns()
        del del_me

    def stop(self) -> list[Allocation]:
        """All allocations that were alive at any time since :meth:`start`."""
        self.snapshot = torch.cuda.memory._snapshot(self.device)
        torch.cuda.memory._record_memory_history(None)
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        return from_snapshot(self.snapshot, index, self._marker, self._began)


def from_snapshot(snapshot: dict[str, Any], device: int, marker: int, began: int) -> list[Allocation]:
    """Allocations from a snapshot of the allocator.

    Args:
        snapshot: of ``torch.cuda.memory._snapshot``.
        device: index among the visible ones.
        marker: size, bytes, of the allocation that compares the clocks; history before it is ignored.
        began: nanoseconds since the epoch when it was made, by the host's clock.

    Raises:
        ValueError: the marker is not in the history, so its times mean nothing.
    """
    events = [event for event in snapshot["device_traces"][device] if event["action"] in ("alloc", "free_requested")]
    first = next((i for i, event in enumerate(events) if event["action"] == "alloc" and event["size"] == marker), None)
    if first is None:
        raise ValueError(
            f"the allocator's history of device {device} has lost its beginning ({len(events)} events): something else "
            "records the memory history too. Let only one do so"
        )
    events = events[first:]
    shift = began - events[0]["time_us"] * 1000
    texts: dict[int, str] = {}
    found: list[Allocation] = []
    open_at: dict[int, Allocation] = {}
    for event in events:
        moment = event["time_us"] * 1000 + shift
        if event["action"] == "alloc":
            one = Allocation(
                event["addr"], _rounded(event["size"]), moment, stack=_stack(event.get("frames", ()), texts)
            )
            open_at[event["addr"]] = one
            found.append(one)
        elif event["addr"] in open_at:
            open_at.pop(event["addr"]).died = moment
        else:  # it was there before
            found.append(Allocation(event["addr"], _rounded(event["size"]), 0, moment))
    for segment in snapshot["segments"]:
        if segment.get("device", device) != device:
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            start = block.get("address", address)
            address = start + block["size"]
            if block["state"] != "active_allocated":
                continue
            if start in open_at:
                open_at[start].size = block["size"]
            else:
                found.append(Allocation(start, block["size"], 0, stack=_stack(block.get("frames", ()), texts)))
    return found


def _rounded(size: int) -> int:
    """The allocator hands out multiples of 512 bytes."""
    return -(-size // 512) * 512


def _stack(frames: Iterable[dict[str, Any]], texts: dict[int, str]) -> tuple[str, ...]:
    """Lines, innermost first; ``texts`` keeps one for each frame, which thousands of stacks share."""
    lines = []
    for frame in frames:
        if id(frame) not in texts:
            texts[id(frame)] = f"{frame['filename']}:{frame['line']} {frame['name']}"
        lines.append(texts[id(frame)])
    return tuple(lines)


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


def label(
    allocations: Sequence[Allocation], marks: Iterable[tuple[int, Sequence[Known]]], spans: Sequence[Span], device: str
) -> None:
    """Say what each allocation is.

    What an inventory has seen is what the inventory says; but an output gradient that waits for its sketch is named by
    its birth, for liger-kernel writes some over activations, which they are at the peak. Of the rest, what was born in
    forward is an activation, and what was born in any other phase a temporary; what was there before and belongs to
    nobody stays unexplained.

    Args:
        allocations: of one device; their ``category`` is set.
        marks: inventories with the time at which each was taken.
        spans: the outermost phases, which do not overlap, in order.
        device: type of the device.
    """
    by_address: dict[int, list[Allocation]] = {}
    for one in allocations:
        by_address.setdefault(one.address, []).append(one)
        one.category, one.owner = "", False
    for moment, known in marks:
        for storage in known:
            if storage.device != device:
                continue
            for one in by_address.get(storage.address, ()):
                if one.born <= moment < one.died:
                    one.owner = True
                    if storage.category != "workspace":
                        one.category = one.category or storage.category
    starts = [span.start for span in spans]
    for one in allocations:
        if one.category:
            continue
        if not one.born:
            one.category = "unexplained"
            continue
        at = bisect.bisect_right(starts, one.born) - 1
        inside = at >= 0 and one.born < spans[at].end
        one.category = "activations" if inside and spans[at].name == "forward" else "workspace"


_ROWS = (*IN_ALLOCATOR, "unexplained")


def curve(allocations: Sequence[Allocation], start: int = 0, end: int = FOREVER) -> Curve:
    """Add up labelled allocations over [start, end)."""
    changes = []
    level = Counter()
    for one in allocations:
        if one.died <= start or one.born >= end:
            continue
        if one.born <= start:
            level[one.category] += one.size
        else:
            changes.append((one.born, one.size, one.category))
        if one.died < end:
            changes.append((one.died, -one.size, one.category))
    changes.sort(key=lambda change: change[0])
    total = sum(level.values())
    times, totals, rows = [start], [total], [tuple(level[name] for name in _ROWS)]
    peak_time, peak, best = start, dict(level), total
    for moment, size, category in changes:
        level[category] += size
        total += size
        times.append(moment)
        totals.append(total)
        rows.append(tuple(level[name] for name in _ROWS))
        if total > best:
            peak_time, peak, best = moment, dict(level), total
    return Curve(times, totals, peak_time, {name: size for name, size in peak.items() if size}, rows)


def alive(allocations: Iterable[Allocation], moment: int) -> list[Allocation]:
    """What was alive at ``moment``, largest first."""
    return sorted((one for one in allocations if one.born <= moment < one.died), key=lambda one: -one.size)


def new_gradients(allocations: Iterable[Allocation], began: int, moment: int) -> list[Allocation]:
    """What backward, which began at ``began``, has allocated and not freed by ``moment``, largest first.

    A kept weight gradient would be among it. What the inventory knows is not: AdamW's gradients, the buckets that they
    are reduced in, output gradients that wait for their sketches. Nor are weights that stage 3 is gathering, which no
    parameter has yet: those DeepSpeed's own lines have allocated.
    """
    return [
        one
        for one in alive(allocations, moment)
        if one.born >= began and not one.owner and not any(_GATHERING in frame for frame in one.stack[:3])
    ]
