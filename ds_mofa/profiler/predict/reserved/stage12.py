"""What PyTorch's caching allocator will reserve under ZeRO (DeepSpeed 0.19): construction and two steps, replayed.

Each stream has blocks of its own: the reduction's are counted here beside the default stream's, those that whole weights
are gathered into in :mod:`ds_mofa.profiler.gathering`.
"""

from collections.abc import Sequence

from ds_mofa.profiler.reserve import CachingAllocator, play
from ds_mofa.profiler.simulate import MicroBatch, Parameter
from ds_mofa.profiler.zero import ZeroSettings, norm_bytes, partitioned, scattered

__all__ = ["reserved_by_stage12", "reserved_by_stage3"]


def reserved_by_stage12(
    zero: ZeroSettings,
    batch: MicroBatch,
    groups: Sequence[Sequence[Parameter]],
    buffers: Sequence[int],
    micro_batches: int,
    *,
    rank: int,
    own_masters: bool,
) -> int:
    """Bytes reserved after two steps under ZeRO stage 1 or 2; see :mod:`ds_mofa.profiler.zero` for what is when.

    Args:
        zero: the stage's settings.
        batch: its micro-batch.
        groups: DeepSpeed's param groups.
        buffers: sizes of what else is there from the beginning, MoFaSGD's for one.
        micro_batches: of one step.
        rank: whose partitions.
        own_masters: whether the masters are a copy.
    """
    reduces_once, contiguous, state_bytes = zero.reduces_once, zero.contiguous_gradients, zero.state_bytes
    bucket = zero.reduce_bucket_size
    touched, sizes = partitioned(groups, zero.world_size)
    apart = scattered(zero, groups)
    mine = {name: elements for name, elements in touched[rank].items() if name not in apart}
    allocator, aside = CachingAllocator(), CachingAllocator()  # the reduction's stream has blocks of its own
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
            allocator.alloc(zero.moment_bytes(size))
        allocator.free(gradient)
    numels = {param.name: param.numel for group in groups for param in group}
    kept_whole = 2 * sum(numels[name] for name in mine)
    for _ in range(2):
        kept: list[tuple] = []
        parts: dict[str, tuple] = {}
        whole: dict[str, tuple] = {}
        count = min(micro_batches, 3)
        for number in range(count):
            last = number == count - 1
            state = {"elements": 0, "buckets": None, "filled": None, "mine": False}
            waiting: list[tuple] = []
            sent: list[tuple] = []  # still read by the stream that reduces

            def complete(
                name: str, state=state, waiting=waiting, whole=whole, last=last, sent=sent, parts=parts
            ) -> None:
                if name not in numels:
                    return
                numel = numels[name]
                if contiguous and state["buckets"] is None:
                    state["buckets"] = [allocator.alloc(2 * bucket) for _ in range(2)]
                if not reduces_once:
                    fresh = allocator.alloc(2 * numel)
                elif name not in whole:
                    whole[name] = allocator.alloc(2 * numel)
                reduces = last or not reduces_once
                if name in apart:
                    if last:
                        parts[name] = allocator.alloc(2 * numel // zero.world_size)
                        sent.append(whole.pop(name) if reduces_once else fresh)
                    return
                if reduces and state["elements"] and state["elements"] + numel > bucket:
                    if contiguous and state["mine"] and state["filled"] is None:
                        state["filled"] = aside.alloc(kept_whole)
                    while waiting:
                        allocator.free(waiting.pop())
                    state["elements"] = 0
                state["elements"] += numel
                state["mine"] |= name in mine
                if not reduces_once and numel > bucket:
                    waiting.append(fresh)
                elif not reduces_once:
                    allocator.free(fresh)

            play(allocator, batch, complete)
            if contiguous and state["filled"] is None and (last or not reduces_once):
                state["filled"] = aside.alloc(kept_whole)
            for handle in [*waiting, *sent, *(state["buckets"] or [])]:
                allocator.free(handle)
            if state["filled"] is not None:
                if kept:
                    aside.free(state["filled"])  # added to the first one's
                else:
                    kept.append(state["filled"])
        if contiguous:  # copied into the flat buffer, in whole
            for handle in whole.values():
                allocator.free(handle)
            whole.clear()
        for elements in () if zero.norm_in_pieces else touched[rank].values():
            allocator.free(allocator.alloc(norm_bytes(elements)))
        for group, size in zip(groups, sizes):
            flat = parts.get(group[0].name) or allocator.alloc(2 * size)
            if state_bytes != 2:
                converted = allocator.alloc(state_bytes * size)
                allocator.free(flat)
                flat = converted
            allocator.free(flat)
        for handle in kept:
            aside.free(handle)
        for handle in whole.values():
            allocator.free(handle)
    return allocator.reserved + aside.reserved


def reserved_by_stage3(
    zero: ZeroSettings,
    batch: MicroBatch,
    groups: Sequence[Sequence[Parameter]],
    buffers: Sequence[int],
    micro_batches: int,
) -> int:
    """Bytes reserved after two steps under ZeRO stage 3, those of gathered weights apart.

    Args:
        zero: the stage's settings.
        batch: its micro-batch.
        groups: DeepSpeed's param groups.
        buffers: sizes of what else is there from the beginning, MoFaSGD's for one.
        micro_batches: of one step.
    """
    allocator, aside = CachingAllocator(), CachingAllocator()
    N, bucket = zero.world_size, zero.reduce_bucket_size
    shards = {}
    for param in batch.parameters:  # built whole, one after the other, and cut
        whole = allocator.alloc(2 * param.numel)
        shards[param.name] = allocator.alloc(2 * (param.numel // N))
        allocator.free(whole)
    trained = [param for group in groups for param in group]
    for param in trained:  # by way of the host into one buffer
        allocator.free(shards.pop(param.name))
    allocator.empty_cache()
    allocator.alloc(2 * sum(param.numel // N for param in trained))
    parts, state = _sub_groups(groups, zero), zero.state_bytes
    converted = None
    for part in parts:  # the masters are a copy of the conversion, which stays until the next one
        following = allocator.alloc(state * part) if state != 2 else None
        if converted is not None:
            allocator.free(converted)
        converted = following
        allocator.alloc(state * part)
    gradient = allocator.alloc(state * max(parts, default=0))
    for handle in (converted, gradient):
        if handle is not None:
            allocator.free(handle)
    for size in (2 * bucket, 2 * sum(param.numel // N for param in trained), *buffers):
        allocator.alloc(size)
    numels = {param.name: param.numel for param in trained}
    for step in range(2):
        for _ in range(min(micro_batches, 3)):
            waiting: list[tuple] = []
            inside: list[int] = []

            def reduce() -> None:
                if len(inside) > 1:  # a gradient alone is reduced where it is
                    aside.free(aside.alloc(2 * sum(inside)))
                inside.clear()
                while waiting:
                    allocator.free(waiting.pop())

            def complete(name: str) -> None:
                numel = numels.get(name)
                if numel is None:
                    return
                if inside and sum(inside) + numel > bucket:
                    reduce()
                inside.append(numel)
                if numel > bucket:  # smaller ones are copied into the bucket
                    waiting.append(allocator.alloc(2 * numel))

            play(allocator, batch, complete)
            reduce()
        for param in trained:
            allocator.free(allocator.alloc(norm_bytes(param.numel // N)))
        for part in parts:
            flat = allocator.alloc(2 * part)
            if state != 2:
                converted = allocator.alloc(state * part)
                allocator.free(flat)
                flat = converted
            if step == 0:
                for _ in range(2):
                    allocator.alloc(zero.moment_bytes(part))
            allocator.free(flat)
    return allocator.reserved + aside.reserved


def _sub_groups(groups: Sequence[Sequence[Parameter]], zero: ZeroSettings) -> list[int]:
    """Elements of this rank's shards by sub-group: parameters are taken in until one holds ``sub_group_size``."""
    parts = []
    for group in groups:
        part = 0
        for param in group:
            part += param.numel // zero.world_size
            if part >= zero.sub_group_size:
                parts.append(part)
                part = 0
        if part:
            parts.append(part)
    return parts
