"""Two runs side by side: what was set otherwise, and what that did."""

from collections.abc import Mapping
from typing import Any

from ds_mofa.profiler.categories import CATEGORIES
from ds_mofa.profiler.layout import fullest
from ds_mofa.profiler.report.document import Document, Points, Section, Table, Text
from ds_mofa.profiler.report.runs import is_prediction, settings_of
from ds_mofa.profiler.report.speed import METRICS, speed
from ds_mofa.profiler.report.units import Unit, unit_of

__all__ = ["difference"]

_METERS = {"allocated": "allocated", "reserved": "reserved", "nvml_device": "NVML, device", "host": "host"}


def difference(names: tuple[str, str], first: Mapping[str, Any], second: Mapping[str, Any]) -> Document:
    """Settings that differ; categories, sorted by how far they are apart; meters; speed.

    Args:
        names: of the runs, which are reports or predictions.
    """
    one, other = settings_of(first), settings_of(second)
    changed = [
        [key, one.get(key, "-"), other.get(key, "-")] for key in {**one, **other} if one.get(key) != other.get(key)
    ]
    settings = Table(["setting", *names], changed) if changed else Text("Nothing that is known of them.")
    sections = [
        Section("What is set otherwise", [settings]),
        Section("The peak by category, the largest difference first", [_categories(names, first, second)]),
    ]
    peaks = _rows({label: (_peaks(first).get(key), _peaks(second).get(key)) for key, label in _METERS.items()})
    if peaks:
        sections.append(Section("Peaks", [Table(["meter", *names, "difference", ""], peaks)]))
    speeds = [row for name in METRICS if (row := _metric(name, speed(first), speed(second)))]
    if speeds:
        sections.append(Section("Speed and energy", [Table(["of the fullest rank", *names, "difference"], speeds)]))
    meters = {_meter(first), _meter(second)}
    if len(meters) > 1:
        sections.append(Section("Notes", [Points([f"The sums are of different meters: {', '.join(sorted(meters))}."])]))
    return Document(f"{names[0]} and {names[1]}", "GB are 1e9 bytes; of the fullest rank", sections)


def _categories(names: tuple[str, str], first: Mapping[str, Any], second: Mapping[str, Any]) -> Table:
    one, other = _peak(first), _peak(second)
    unit = unit_of([sum(one.values()), sum(other.values())])
    used = [name for name in CATEGORIES if one.get(name) or other.get(name)]
    used.sort(key=lambda name: -abs(other.get(name, 0) - one.get(name, 0)))
    rows = [_row(name, one.get(name, 0), other.get(name, 0), unit) for name in used]
    rows.append(_row("sum", sum(one.values()), sum(other.values()), unit))
    return Table([f"category, {unit.name}", *names, "difference", ""], rows, summed=True)


def _rows(sizes: Mapping[str, tuple[int | None, int | None]]) -> list[list[str]]:
    both = {name: (one, other) for name, (one, other) in sizes.items() if one is not None and other is not None}
    unit = unit_of([size for pair in both.values() for size in pair])
    return [_row(f"{name}, {unit.name}", one, other, unit) for name, (one, other) in both.items()]


def _row(name: str, one: int, other: int, unit: Unit) -> list[str]:
    """Both in one unit, their difference, and its share of the first."""
    apart = other - one
    signed = ("+" if apart > 0 else "") + unit.number(apart, digits=3)
    return [
        name,
        unit.number(one, digits=3),
        unit.number(other, digits=3),
        signed,
        f"{apart / one:+.1%}" if one else "-",
    ]


def _metric(name: str, one: Mapping[str, float], other: Mapping[str, float]) -> list[str] | None:
    if name not in one or name not in other:
        return None
    metric = METRICS[name]
    apart = f"{other[name] / one[name] - 1:+.1%}" if one[name] else "-"
    return [metric.label, metric.text(one[name]), metric.text(other[name]), apart]


def _peak(run: Mapping[str, Any]) -> Mapping[str, int]:
    return run["categories"] if is_prediction(run) else fullest(run)["breakdown"]["categories"]


def _peaks(run: Mapping[str, Any]) -> Mapping[str, int | None]:
    if is_prediction(run):
        return {"allocated": run["allocated"], "nvml_device": run["total"]}
    return fullest(run)["peaks"]


def _meter(run: Mapping[str, Any]) -> str:
    return "a prediction" if is_prediction(run) else fullest(run)["breakdown"]["meter"]
