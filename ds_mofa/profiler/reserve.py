"""What PyTorch's caching allocator will reserve: its rules, played through on the allocations of a few steps.

The rules (CUDACachingAllocator, defaults): sizes are rounded to 512 bytes; up to 1 MiB come from segments of 2 MiB,
up to 10 MiB from segments of 20 MiB, larger ones from segments of their own in steps of 2 MiB; the smallest free block
that fits is taken, and split where more than 1 MiB (512 bytes in small segments) would be left; freed neighbours are
joined. So a large free block serves small requests, but not the other way round: hence what is reserved and unused.
"""

import bisect
from collections.abc import Mapping, Sequence

from ds_mofa.profiler.simulate import MicroBatch, Parameter

__all__ = ["CachingAllocator", "reserved_by_plain_loop", "reserved_by_stage12"]

_MIB = 1 << 20


class _Block:
    __slots__ = ("start", "size", "free", "previous", "next")

    def __init__(self, start: int, size: int):
        self.start, self.size, self.free = start, size, True
        self.previous: _Block | None = None
        self.next: _Block | None = None


class CachingAllocator:
    """One stream's pools.

    Attributes:
        reserved: bytes taken from the driver; they are never given back.
        allocated: bytes in use.
        peak: the largest of those.
    """

    def __init__(self):
        self.reserved = self.allocated = self.peak = 0
        self._address = 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}

    def alloc(self, size: int) -> tuple[bool, _Block]:
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

    def free(self, handle: tuple[bool, _Block]) -> None:
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


def _play(allocator: CachingAllocator, batch: MicroBatch, complete) -> None:
    """The allocations of one micro-batch; ``complete(name)`` at each gradient."""
    live = {}
    for kind, key, size in batch.events:
        if kind == "alloc":
            live[key] = allocator.alloc(size)
        elif kind == "free":
            allocator.free(live.pop(key))
        else:
            complete(key)
    for handle in live.values():
        allocator.free(handle)


def reserved_by_plain_loop(
    batch: MicroBatch,
    trained: Sequence[Parameter],
    buffers: Sequence[int],
    moments: int,
    micro_batches: int,
) -> int:
    """Bytes reserved after two steps of a plain loop in bf16.

    Args:
        batch: its micro-batch.
        trained: what gets a gradient and ``moments`` bytes of state an element.
        buffers: sizes of what else is there from the beginning, MoFaSGD's for one.
        moments: bytes of state an element.
        micro_batches: of one step.
    """
    allocator = CachingAllocator()
    for param in batch.parameters:
        allocator.alloc(2 * param.numel)
    for size in buffers:
        allocator.alloc(size)
    sizes = {param.name: 2 * param.numel for param in trained}
    for step in range(2):
        grads: dict[str, tuple] = {}

        def complete(name: str, grads=grads) -> None:
            if name in sizes and name not in grads:
                grads[name] = allocator.alloc(sizes[name])

        for _ in range(min(micro_batches, 3)):
            _play(allocator, batch, complete)
        if step == 0:
            for param in trained:
                for _ in range(2):
                    allocator.alloc(moments // 2 * param.numel)
        for handle in grads.values():
            allocator.free(handle)
    return allocator.reserved


def reserved_by_stage12(
    batch: MicroBatch,
    groups: Sequence[Sequence[Parameter]],
    buffers: Sequence[int],
    *,
    reduces_once: bool,
    mine: Mapping[str, int],
    sizes: Sequence[int],
    state_bytes: int,
    own_masters: bool,
    bucket: int,
    contiguous: bool,
    micro_batches: int,
) -> int:
    """Bytes reserved after two steps under ZeRO stage 1 or 2; see :mod:`ds_mofa.profiler.zero` for what is when.

    Args:
        reduces_once: of :class:`ds_mofa.profiler.zero.ZeroSettings`.
        mine, sizes: what the rank's partitions touch and have, of :func:`ds_mofa.profiler.zero.partitioned`.
        state_bytes: of one number of the masters and moments.
        own_masters: whether the masters are a copy.
        bucket: bytes of all reduce buckets.
        contiguous: ``contiguous_gradients``.
    """
    allocator = CachingAllocator()
    weights = {param.name: allocator.alloc(2 * param.numel) for param in batch.parameters}
    for size in buffers:
        allocator.alloc(size)
    for group, size in zip(groups, sizes):  # flattened, and cut into partitions
        allocator.alloc(2 * sum(param.numel for param in group))
        for param in group:
            allocator.free(weights.pop(param.name))
        clone = allocator.alloc(2 * size)
        if state_bytes != 2 and own_masters:
            allocator.alloc(state_bytes * size)
        if state_bytes != 2 or not own_masters:
            allocator.free(clone)
    for size in sizes:
        gradient = allocator.alloc(state_bytes * size)
        for _ in range(2):
            allocator.alloc(state_bytes * size)
        allocator.free(gradient)
    kept_whole = 2 * sum(mine.values())
    numels = {param.name: param.numel for group in groups for param in group}
    for _ in range(2):
        kept: list[tuple] = []
        whole: dict[str, tuple] = {}
        count = min(micro_batches, 3)
        for number in range(count):
            last = number == count - 1
            state = {"elements": 0, "buckets": None, "filled": None, "mine": False}
            waiting: list[tuple] = []

            def complete(name: str, state=state, waiting=waiting, whole=whole, last=last) -> None:
                if name not in numels:
                    return
                numel = numels[name]
                if contiguous and state["buckets"] is None:
                    state["buckets"] = [allocator.alloc(bucket // 2) for _ in range(2)]
                if not reduces_once:
                    fresh = allocator.alloc(2 * numel)
                elif name not in whole:
                    whole[name] = allocator.alloc(2 * numel)
                reduces = last or not reduces_once
                if reduces and state["elements"] and state["elements"] + numel > bucket // 4:
                    if contiguous and state["mine"] and state["filled"] is None:
                        state["filled"] = allocator.alloc(kept_whole)
                    while waiting:
                        allocator.free(waiting.pop())
                    state["elements"] = 0
                state["elements"] += numel
                state["mine"] |= name in mine
                if not reduces_once and numel > bucket // 4:
                    waiting.append(fresh)
                elif not reduces_once:
                    allocator.free(fresh)

            _play(allocator, batch, complete)
            if contiguous and state["filled"] is None and (last or not reduces_once):
                state["filled"] = allocator.alloc(kept_whole)
            for handle in [*waiting, *(state["buckets"] or [])]:
                allocator.free(handle)
            if state["filled"] is not None:
                if kept:
                    allocator.free(state["filled"])  # added to the first one's
                else:
                    kept.append(state["filled"])
        if contiguous:  # copied into the flat buffer, in whole
            for handle in whole.values():
                allocator.free(handle)
            whole.clear()
        for size in sizes:
            flat = allocator.alloc(2 * size)
            if state_bytes != 2:
                converted = allocator.alloc(state_bytes * size)
                allocator.free(flat)
                flat = converted
            allocator.free(flat)
        for handle in [*kept, *whole.values()]:
            allocator.free(handle)
    return allocator.reserved
