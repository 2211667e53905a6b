"""What a run's report says of speed and energy, as numbers and as text."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ds_mofa.profiler.layout import fullest

__all__ = ["METRICS", "Metric", "speed", "speed_of_rank"]


class Metric(NamedTuple):
    """How a number is called and written."""

    label: str
    text: Callable[[float], str]


METRICS = {
    "seconds": Metric("ms a step", lambda value: f"{value * 1e3:,.1f}"),
    "tokens_per_second": Metric("tokens/s of a rank", lambda value: f"{value:,.0f}"),
    "mfu": Metric("model FLOPs utilisation", lambda value: f"{value:.1%}"),
    "tokens_per_joule": Metric("tokens/J", lambda value: f"{value:,.2f}"),
}


def speed(run: Mapping[str, Any]) -> dict[str, float]:
    """Those of :data:`METRICS` that the fullest rank has measured; nothing of a prediction."""
    return speed_of_rank(fullest(run)) if "ranks" in run else {}


def speed_of_rank(rank: Mapping[str, Any]) -> dict[str, float]:
    """``seconds`` is the median of the steps but the one that was recorded. Reports of before have no other."""
    found = {name: value for name, value in (rank.get("throughput") or {}).items() if name in METRICS}
    if rank["step_seconds"]:
        found["seconds"] = statistics.median(rank["step_seconds"])
    return {name: found[name] for name in METRICS if found.get(name) is not None}
