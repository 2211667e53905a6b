"""How long a step's collectives take, and for how much of it nothing else runs on the GPU."""

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["collective_times"]

Span = tuple[float, float]


def collective_times(kernels: Iterable[Any]) -> dict[str, float]:
    """Milliseconds in NCCL's kernels, and those of them in which no other kernel ran, of one rank.

    A kernel of NCCL that waits for another rank counts as long as it waits.

    Args:
        kernels: events of ``torch.profiler`` on one CUDA device: ``name`` and ``time_range`` in microseconds.
    """
    spans: dict[bool, list[Span]] = {True: [], False: []}
    for kernel in kernels:
        spans[kernel.name.startswith("nccl")].append((kernel.time_range.start, kernel.time_range.end))
    sent = _union(spans[True])
    hidden = _overlap(sent, _union(spans[False]))
    total = sum(end - start for start, end in sent)
    return {"collectives_ms": round(total / 1e3, 2), "collectives_alone_ms": round((total - hidden) / 1e3, 2)}


def _union(spans: Sequence[Span]) -> list[Span]:
    """The same times as spans that do not meet, in order."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def _overlap(first: Sequence[Span], second: Sequence[Span]) -> float:
    """How long both last; each in order, and disjoint."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total
