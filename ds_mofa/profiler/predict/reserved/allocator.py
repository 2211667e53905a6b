"""What PyTorch's caching allocator will reserve: its rules, played through on the allocations of a few steps.

The rules (CUDACachingAllocator, defaults): sizes are rounded to 512 bytes; up to 1 MiB come from segments of 2 MiB,
up to 10 MiB from segments of 20 MiB, larger ones from segments of their own in steps of 2 MiB; the smallest free block
that fits is taken, and split where more than 1 MiB (512 bytes in small segments) would be left; freed neighbours are
joined. So a large free block serves small requests, but not the other way round: hence what is reserved and unused.
"""

import bisect
from collections.abc import Callable

from ds_mofa.profiler.predict.simulated.micro_batch import MicroBatch

__all__ = ["CachingAllocator", "Handle", "play"]

_MIB = 1 << 20


class _Block:
    __slots__ = ("start", "size", "free", "previous", "next")

    def __init__(self, start: int, size: int):
        self.start, self.size, self.free = start, size, True
        self.previous: _Block | None = None
        self.next: _Block | None = None


Handle = tuple[bool, _Block]  # to memory of a small segment or a large one


class CachingAllocator:
    """One stream's pools.

    Attributes:
        reserved: bytes taken from the driver; only :meth:`empty_cache` gives some back.
        allocated: bytes in use.
        peak: the largest of those.
    """

    def __init__(self) -> None:
        self.reserved = self.allocated = self.peak = 0
        self._address = 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}

    def alloc(self, size: int) -> Handle:
        """A handle to ``size`` bytes."""
        size = max(512, -(-size // 512) * 512)
        small = size <= _MIB
        pool = self._free[small]
        at = bisect.bisect_left(pool, (size, -1))
        if at == len(pool):
            segment = 2 * _MIB if small else 20 * _MIB if size < 10 * _MIB else -(-size // (2 * _MIB)) * 2 * _MIB
            block = _Block(self._address, segment)
            self._address += segment + 1  # no two segments are neighbours
            self.reserved += segment
        else:
            block = pool.pop(at)[2]
        if block.size - size > (511 if small else _MIB):
            rest = _Block(block.start + size, block.size - size)
            rest.previous, rest.next, block.size = block, block.next, size
            if rest.next is not None:
                rest.next.previous = rest
            block.next = rest
            bisect.insort(pool, (rest.size, rest.start, rest))
        block.free = False
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return small, block

    def free(self, handle: Handle) -> None:
        small, block = handle
        pool = self._free[small]
        self.allocated -= block.size
        block.free = True
        for first, second in ((block, block.next), (block.previous, block)):
            if first is None or second is None or not (first.free and second.free):
                continue
            other = second if second is not block else first
            del pool[bisect.bisect_left(pool, (other.size, other.start))]
            first.size += second.size
            first.next = second.next
            if first.next is not None:
                first.next.previous = first
            block = first
        bisect.insort(pool, (block.size, block.start, block))

    def empty_cache(self) -> None:
        """Give back the segments in which nothing is in use."""
        for pool in self._free.values():
            whole = [entry for entry in pool if entry[2].previous is None and entry[2].next is None]
            for entry in whole:
                pool.remove(entry)
                self.reserved -= entry[0]


def play(
    allocator: CachingAllocator,
    batch: MicroBatch,
    complete: Callable[[str], None],
    gathering: CachingAllocator | None = None,
) -> None:
    """The allocations of one micro-batch; ``complete(name)`` at each gradient.

    Args:
        gathering: of the stream that FSDP2 gathers on.
    """
    live = {}
    for kind, key, size in batch.events:
        stream = gathering if gathering is not None and isinstance(key, tuple) else allocator
        if kind == "alloc":
            live[key] = stream, stream.alloc(size)
        elif kind == "free":
            stream.free(live.pop(key)[1])
        else:
            complete(key)
    for stream, handle in live.values():
        stream.free(handle)
