"""What PyTorch's caching allocator will reserve in a plain loop, under DDP and under FSDP2: two steps, replayed."""

from collections.abc import Mapping, Sequence

from ds_mofa.profiler.predict.reserved.allocator import CachingAllocator, Handle, play
from ds_mofa.profiler.predict.simulated.micro_batch import MicroBatch

__all__ = ["reserved_by_plain_loop"]


def reserved_by_plain_loop(
    batch: MicroBatch,
    weights: Sequence[int],
    gradients: Mapping[str, int],
    moments: Sequence[int],
    buffers: Sequence[int],
    micro_batches: int,
) -> int:
    """Bytes reserved after two steps.

    Args:
        batch: its micro-batch.
        weights: sizes, of what this rank holds.
        gradients: sizes, by name.
        moments: sizes of AdamW's, which come with the first step.
        buffers: sizes of what else is there from the beginning, MoFaSGD's for one.
        micro_batches: of one step.
    """
    allocator, gathering = CachingAllocator(), CachingAllocator()
    for size in (*weights, *buffers):
        allocator.alloc(size)
    for step in range(2):
        grads: dict[str, Handle] = {}

        def complete(name: str, grads=grads) -> None:
            if gradients.get(name) and name not in grads:
                grads[name] = allocator.alloc(gradients[name])

        for _ in range(min(micro_batches, 3)):
            play(allocator, batch, complete, gathering)
        if step == 0:
            for size in moments:
                allocator.alloc(size)
        for handle in grads.values():
            allocator.free(handle)
    return allocator.reserved + gathering.reserved
