"""Every allocation of a stretch of time on a GPU, from PyTorch's allocator (``torch.cuda.memory._record_memory_history``)."""

import time
from collections.abc import Iterable
from typing import Any

import torch

from ds_mofa.profiler.storages import Allocation

__all__ = ["CudaHistory", "from_snapshot"]


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
