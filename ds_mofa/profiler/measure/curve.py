"""What each allocation was, and how much of what was alive at any moment."""

import bisect
import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ds_mofa.profiler.categories import IN_ALLOCATOR
from ds_mofa.profiler.measure.inventory import Known
from ds_mofa.profiler.storages import FOREVER, Allocation, of_fsdp2

__all__ = ["ROWS", "Curve", "Span", "alive", "curve", "label", "new_gradients"]

ROWS = (*IN_ALLOCATOR, "unexplained")
_GATHERING = "deepspeed/runtime/zero/partition_parameters.py"


class Span(NamedTuple):
    """A phase as it happened, times in nanoseconds since the epoch."""

    name: str
    start: int
    end: int


@dataclasses.dataclass
class Curve:
    """Bytes by category over time, at every change.

    Attributes:
        times: nanoseconds since the epoch.
        totals: bytes at each of them.
        peak_time: when the total was largest.
        peak: bytes by category then.
        rows: bytes by category at ``times``; those of :data:`ROWS`.
    """

    times: list[int]
    totals: list[int]
    peak_time: int
    peak: dict[str, int]
    rows: list[tuple[int, ...]]


def label(
    allocations: Sequence[Allocation], marks: Iterable[tuple[int, Sequence[Known]]], spans: Sequence[Span], device: str
) -> None:
    """Say what each allocation is.

    What an inventory has seen is what the inventory says; but an output gradient that waits for its sketch is named by
    its birth, for liger-kernel writes some over activations, which they are at the peak. Of the rest, what FSDP2's own
    lines have allocated is communication, which on a device only stacks tell; what was born in forward is an
    activation, and what was born in any other phase a temporary; what was there before and belongs to nobody stays
    unexplained.

    Args:
        allocations: of one device; their ``category`` is set.
        marks: inventories with the time at which each was taken.
        spans: the outermost phases, which do not overlap, in order.
        device: type of the device.
    """
    by_address: dict[int, list[Allocation]] = {}
    for one in allocations:
        by_address.setdefault(one.address, []).append(one)
        one.category, one.owner = "", False
    for moment, known in marks:
        for storage in known:
            if storage.device != device:
                continue
            for one in by_address.get(storage.address, ()):
                if one.born <= moment < one.died:
                    one.owner = True
                    if storage.category != "workspace":
                        one.category = one.category or storage.category
    starts = [span.start for span in spans]
    for one in allocations:
        if one.category:
            continue
        if not one.born:
            one.category = "unexplained"
            continue
        if of_fsdp2(one):
            one.category = "communication buffers"
            continue
        at = bisect.bisect_right(starts, one.born) - 1
        inside = at >= 0 and one.born < spans[at].end
        one.category = "activations" if inside and spans[at].name == "forward" else "workspace"


def curve(allocations: Sequence[Allocation], start: int = 0, end: int = FOREVER) -> Curve:
    """Add up labelled allocations over [start, end)."""
    changes = []
    level: Counter[str] = Counter()
    for one in allocations:
        if one.died <= start or one.born >= end:
            continue
        if one.born <= start:
            level[one.category] += one.size
        else:
            changes.append((one.born, one.size, one.category))
        if one.died < end:
            changes.append((one.died, -one.size, one.category))
    changes.sort(key=lambda change: change[0])
    total = sum(level.values())
    times, totals, rows = [start], [total], [tuple(level[name] for name in ROWS)]
    peak_time, peak, best = start, dict(level), total
    for moment, size, category in changes:
        level[category] += size
        total += size
        times.append(moment)
        totals.append(total)
        rows.append(tuple(level[name] for name in ROWS))
        if total > best:
            peak_time, peak, best = moment, dict(level), total
    return Curve(times, totals, peak_time, {name: size for name, size in peak.items() if size}, rows)


def alive(allocations: Iterable[Allocation], moment: int) -> list[Allocation]:
    """What was alive at ``moment``, largest first."""
    return sorted((one for one in allocations if one.born <= moment < one.died), key=lambda one: -one.size)


def new_gradients(allocations: Iterable[Allocation], began: int, moment: int) -> list[Allocation]:
    """What backward, which began at ``began``, has allocated and not freed by ``moment``, largest first.

    A kept weight gradient would be among it. What the inventory knows is not: AdamW's gradients, the buckets that they
    are reduced in, output gradients that wait for their sketches. Nor are weights that stage 3 is gathering, which no
    parameter has yet: those DeepSpeed's own lines have allocated.
    """
    return [
        one
        for one in alive(allocations, moment)
        if one.born >= began and not one.owner and not any(_GATHERING in frame for frame in one.stack[:3])
    ]
