"""What PyTorch's caching allocator will reserve in a plain loop: two steps, replayed."""

from collections.abc import Callable, Sequence

from ds_mofa.profiler.predict.reserved.allocator import CachingAllocator, Handle, play
from ds_mofa.profiler.predict.simulated.micro_batch import MicroBatch, Parameter

__all__ = ["reserved_by_plain_loop"]


def reserved_by_plain_loop(
    batch: MicroBatch,
    trained: Sequence[Parameter],
    buffers: Sequence[int],
    moments: Callable[[int], int],
    micro_batches: int,
) -> int:
    """Bytes reserved after two steps of a plain loop in bf16.

    Args:
        batch: its micro-batch.
        trained: what gets a gradient and two moments.
        buffers: sizes of what else is there from the beginning, MoFaSGD's for one.
        moments: bytes of one moment of so many elements.
        micro_batches: of one step.
    """
    allocator = CachingAllocator()
    for param in batch.parameters:
        allocator.alloc(2 * param.numel)
    for size in buffers:
        allocator.alloc(size)
    sizes = {param.name: 2 * param.numel for param in trained}
    for step in range(2):
        grads: dict[str, Handle] = {}

        def complete(name: str, grads=grads) -> None:
            if name in sizes and name not in grads:
                grads[name] = allocator.alloc(sizes[name])

        for _ in range(min(micro_batches, 3)):
            play(allocator, batch, complete)
        if step == 0:
            for param in trained:
                for _ in range(2):
                    allocator.alloc(moments(param.numel))
        for handle in grads.values():
            allocator.free(handle)
    return allocator.reserved
