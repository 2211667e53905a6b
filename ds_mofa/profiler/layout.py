"""What the figures show, as numbers: shared by the HTML page and the PNGs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ds_mofa.profiler.categories import CATEGORIES

__all__ = ["Bar", "COLORS", "DARK", "bars", "fullest", "stacked_run", "stacked_step"]

# After Observable's categorical palette: told apart in light and dark, and by most who do not see all colours.
COLORS = {
    "weights": "#4269d0",
    "master weights": "#97bbf5",
    "gradients": "#ff725c",
    "AdamW states": "#efb118",
    "other optimizer states": "#9c6b4e",
    "factors": "#3ca951",
    "sketches": "#6cc5b0",
    "activations": "#a463f2",
    "workspace": "#ff8ab7",
    "communication buffers": "#2bb5d8",
    "allocator slack": "#aab2bd",
    "CUDA context": "#7d8793",
    "before this process": "#cdd3da",
    "process base": "#7d8793",
    "unexplained": "#5b5148",
    "outside the allocator": "#7d8793",
    "allocated": "#4269d0",
    "resident set": "#4269d0",
}

# On these a dark text cannot be read.
DARK = {"weights", "unexplained", "other optimizer states"}


class Bar(NamedTuple):
    """One stacked bar; bytes by category, bottom first."""

    label: str
    kind: str  # "measured" or "predicted"
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def fullest(report: Mapping[str, Any]) -> dict[str, Any]:
    """The rank with the largest total."""
    return max(report["ranks"], key=lambda rank: rank["breakdown"]["total"])


def bars(runs: Mapping[str, dict[str, Any]]) -> list[Bar]:
    """Each run's fullest rank at its peak, its prediction beside it."""
    found = []
    for name, report in runs.items():
        if "ranks" not in report:
            continue
        found.append(Bar(name, "measured", _ordered(fullest(report)["breakdown"]["categories"])))
        if report.get("predicted"):
            found.append(Bar(name, "predicted", _ordered(report["predicted"]["categories"])))
    return found


def stacked_step(rank: Mapping[str, Any]) -> tuple[list[float], dict[str, list[int]], list[dict], float] | None:
    """(milliseconds, bytes by category, phases, milliseconds of the peak) of the detailed step, or None."""
    step = rank["step_timeline"]
    if step is None:
        return None
    return step["milliseconds"], _ordered(step["categories"]), step["phases"], step["peak_milliseconds"]


def stacked_run(rank: Mapping[str, Any]) -> tuple[list[float], dict[str, list[int]]]:
    """(seconds, bytes by layer) of the whole run: what is allocated, what is reserved beyond, what lies outside."""
    timeline = rank["timeline"]
    times = timeline["seconds"]
    if any(value is not None for value in timeline["allocated"]):
        allocated = [value or 0 for value in timeline["allocated"]]
        reserved = [max(value or 0, a) for value, a in zip(timeline["reserved"], allocated)]
        layers = {"allocated": allocated, "allocator slack": [r - a for r, a in zip(reserved, allocated)]}
        if any(value is not None for value in timeline["nvml_device"]):
            seen = timeline["nvml_device"]
            layers["outside the allocator"] = [max(0, (n or 0) - r) for n, r in zip(seen, reserved)]
        return times, layers
    return times, {"resident set": timeline["host"]}


def _ordered(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: parts[name] for name in CATEGORIES if name in parts}
