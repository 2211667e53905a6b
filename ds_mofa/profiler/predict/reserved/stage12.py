"""What PyTorch's caching allocator will reserve under ZeRO stages 1 and 2 (DeepSpeed 0.19): construction and two steps,
replayed. Each stream has blocks of its own: the reduction's are counted here beside the default stream's.
"""

import dataclasses
from collections.abc import Sequence

from ds_mofa.profiler.predict.reserved.allocator import CachingAllocator, Handle, play
from ds_mofa.profiler.predict.simulated.micro_batch import MicroBatch, Parameter
from ds_mofa.profiler.predict.zero import ZeroSettings, norm_bytes, partitioned, scattered

__all__ = ["reserved_by_stage12"]


@dataclasses.dataclass
class _Reduction:
    """Where the reduction of one micro-batch's gradients stands.

    Attributes:
        elements: in the bucket.
        buckets: the buckets themselves, from the first gradient on where they are contiguous.
        filled: the flat buffer of the gradients that this rank's partitions touch.
        mine: whether the bucket holds any of those.
    """

    elements: int = 0
    buckets: list[Handle] | None = None
    filled: Handle | None = None
    mine: bool = False


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
    """Bytes reserved after two steps under ZeRO stage 1 or 2; see :mod:`ds_mofa.profiler.predict.stage12` for what is when.

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
    weights = {
        param.name: allocator.alloc(param.numel if param.eight_bits else 2 * param.numel) for param in batch.parameters
    }
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
        kept: list[Handle] = []
        parts: dict[str, Handle] = {}
        whole: dict[str, Handle] = {}
        count = min(micro_batches, 3)
        for number in range(count):
            last = number == count - 1
            state = _Reduction()
            waiting: list[Handle] = []
            sent: list[Handle] = []  # still read by the stream that reduces

            def complete(
                name: str, state=state, waiting=waiting, whole=whole, last=last, sent=sent, parts=parts
            ) -> None:
                if name not in numels:
                    return
                numel = numels[name]
                if contiguous and state.buckets is None:
                    state.buckets = [allocator.alloc(2 * bucket) for _ in range(2)]
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
                if reduces and state.elements and state.elements + numel > bucket:
                    if contiguous and state.mine and state.filled is None:
                        state.filled = aside.alloc(kept_whole)
                    while waiting:
                        allocator.free(waiting.pop())
                    state.elements = 0
                state.elements += numel
                state.mine |= name in mine
                if not reduces_once and numel > bucket:
                    waiting.append(fresh)
                elif not reduces_once:
                    allocator.free(fresh)

            play(allocator, batch, complete)
            if contiguous and state.filled is None and (last or not reduces_once):
                state.filled = aside.alloc(kept_whole)
            for handle in [*waiting, *sent, *(state.buckets or [])]:
                allocator.free(handle)
            if state.filled is not None:
                if kept:
                    aside.free(state.filled)  # added to the first one's
                else:
                    kept.append(state.filled)
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
