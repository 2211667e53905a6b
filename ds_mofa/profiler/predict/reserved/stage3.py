"""What PyTorch's caching allocator will reserve under ZeRO stage 3 (DeepSpeed 0.19): construction and two steps, replayed.

The blocks of the stream that whole weights are gathered on are in :mod:`ds_mofa.profiler.predict.reserved.gathering`.
"""

from collections.abc import Sequence

from ds_mofa.profiler.predict.reserved.allocator import CachingAllocator, Handle, play
from ds_mofa.profiler.predict.simulated.micro_batch import MicroBatch, Parameter
from ds_mofa.profiler.predict.zero import ZeroSettings, norm_bytes

__all__ = ["reserved_by_stage3"]


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
            waiting: list[Handle] = []
            inside: list[int] = []

            def reduce(waiting=waiting, inside=inside) -> None:
                if len(inside) > 1:  # a gradient alone is reduced where it is
                    aside.free(aside.alloc(2 * sum(inside)))
                inside.clear()
                while waiting:
                    allocator.free(waiting.pop())

            def complete(name: str, waiting=waiting, inside=inside, reduce=reduce) -> None:
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
