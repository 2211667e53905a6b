"""What stands at the peak of the recorded step: the allocation that made it, and the largest of what was alive."""

from collections.abc import Sequence
from typing import Any

from ds_mofa.profiler.measure.curve import Curve, Span, alive
from ds_mofa.profiler.storages import Allocation

__all__ = ["at_peak"]

_LINES = 20  # of a stack
_PIECES = 12


def at_peak(allocations: Sequence[Allocation], curve: Curve, spans: Sequence[Span]) -> dict[str, Any]:
    """Sizes in bytes.

    Args:
        allocations: labelled.
        curve: over all of them.
        spans: phases, outer and inner ones.

    Returns:
        ``phase``: the innermost at that moment, or None; ``allocation``: the one that made the peak, with ``size``,
        ``category`` and ``stack``, innermost line first, or None where the step began with the peak; ``pieces``: the largest
        that were alive, with ``count`` of those that have category and stack in common.
    """
    moment = curve.peak_time
    inside = [span for span in spans if span.start <= moment < span.end]
    born = [one for one in allocations if one.born == moment]
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for one in alive(allocations, moment):
        groups.setdefault((one.category, one.stack[:_LINES]), []).append(one.size)
    largest = sorted(groups.items(), key=lambda group: -sum(group[1]))[:_PIECES]
    return {
        "phase": min(inside, key=lambda span: span.end - span.start).name if inside else None,
        "allocation": _described(max(born, key=lambda one: one.size)) if born else None,
        "pieces": [
            {"category": category, "size": sum(sizes), "count": len(sizes), "stack": list(stack)}
            for (category, stack), sizes in largest
        ],
    }


def _described(one: Allocation) -> dict[str, Any]:
    return {"size": one.size, "category": one.category, "stack": list(one.stack[:_LINES])}
