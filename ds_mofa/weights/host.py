"""Writing the update into weights, and fp32 masters, that lie in host memory.

The low-rank update of a chunk needs the matching rows of U, and V, and those are on the GPU; so is the speed. A chunk
goes in, is written by the same kernel as a weight that lives there, and goes out again. The random bits of the rounding
are an element's own, whatever the chunk.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_mofa.kernels.shard import Shard
from ds_mofa.weights.staging import Staging
from ds_mofa.weights.write import each_of, write_updates

__all__ = ["CHUNK_BYTES", "chunks", "write_wherever"]

CHUNK_BYTES = 1 << 26  # of one of the two buffers: 1.3 ms on a bus of 50 GB/s, many times what its launches take


def write_wherever(
    staging: Staging,
    shards: Sequence[Shard],
    U: Tensor,
    V: Tensor,
    coefficients: Tensor,
    *,
    numbers: Tensor,
    masters: Sequence[Tensor] | None = None,
    **how,
) -> None:
    """:func:`ds_mofa.weights.write_updates` of shards and masters any of which may lie in host memory.

    Those that do take turns in buffers of 2 x ``CHUNK_BYTES`` on U's device; nothing else of their size is there. The
    host sees them after ``staging.finish()``.
    """
    lying = [
        (_elsewhere(shard.flat, U.device), masters is not None and _elsewhere(masters[i], U.device))
        for i, shard in enumerate(shards)
    ]
    # ZeRO keeps small parameters on the GPU up to a total, so of one shape some may lie here and some there.
    first = count = 0
    for away, run in itertools.groupby(lying):
        some = slice(first, first + len(list(run)))
        first = some.stop
        own = slice(count, count := count + sum(shard.count for shard in shards[some]))
        arguments = (shards[some], U[own], V[own], coefficients[own])
        rest = {"numbers": numbers[own], "masters": None if masters is None else masters[some], **how}
        if any(away):
            _write_through(staging, away, *arguments, **rest)
        else:
            write_updates(*arguments, **rest)


def _write_through(staging, away, shards, U, V, coefficients, *, numbers, masters, **how) -> None:
    masters = None if masters is None else each_of(masters, shards)
    shards = [one for shard in shards for one in shard.each()]
    weights = [shard.flat for shard in shards]
    kinds = [weights] if masters is None else [weights, masters]
    moving = [tensors for tensors, is_away in zip(kinds, away) if is_away]
    bytes_each = sum(tensors[0].element_size() for tensors in moving)
    places = list(chunks(len(shards), shards[0].start, weights[0].numel(), bytes_each))
    pieces = [[tensor[low:high] for kind in moving for tensor in kind[some]] for some, low, high in places]
    for (some, low, high), staged in zip(places, staging.passes(pieces, back=True), strict=True):
        arrived = iter(staged)
        here = [
            [next(arrived) if is_away else tensor[low:high] for tensor in kind[some]]
            for kind, is_away in zip(kinds, away)
        ]
        write_updates(
            [Shard(flat, shard.start + low) for flat, shard in zip(here[0], shards[some])],
            U[some],
            V[some],
            coefficients[some],
            numbers=numbers[some],
            masters=None if masters is None else here[1],
            **how,
        )


def chunks(count: int, start: int, numel: int, bytes_each: int) -> Iterator[tuple[slice, int, int]]:
    """Which of ``count`` shards, and which elements [low, high) of each, pass together: ``CHUNK_BYTES`` or less.

    Args:
        count: of the shards.
        start: index of the first element of each in its matrix.
        numel: of each.
        bytes_each: of one element.
    """
    limit = max(2, CHUNK_BYTES // bytes_each)
    if numel == 0:
        return
    if numel <= limit:
        step = limit // numel
        for first in range(0, count, step):
            yield slice(first, min(first + step, count)), 0, numel
        return
    length = limit - limit % 1024 or limit
    # The kernel that takes two neighbours as one word serves an even number of weights from an even place on. Odd
    # chunks where the whole is odd, else even ones: so it serves each if it would serve the whole, and none if not, and
    # the sums of products are rounded by the same kernel.
    odd = start % 2 == 0 and numel % 2 == 1
    length -= (length - odd) % 2
    for i in range(count):
        for low in range(0, numel, length):
            yield slice(i, i + 1), low, min(low + length, numel)


def _elsewhere(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type != device.type
