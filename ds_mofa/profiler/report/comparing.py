"""Tables and bars of any number of runs, a row each, so that they stay as wide as a page however many there are."""

from collections.abc import Mapping, Sequence
from typing import Any

from ds_mofa.profiler.categories import CATEGORIES
from ds_mofa.profiler.layout import fullest
from ds_mofa.profiler.report.charts import Bar
from ds_mofa.profiler.report.document import Section, Table
from ds_mofa.profiler.report.runs import settings_of
from ds_mofa.profiler.report.speed import METRICS, speed, speed_of_rank
from ds_mofa.profiler.report.units import shown, unit_of

__all__ = ["Runs", "bars", "breakdowns", "differing", "ordered", "over_ranks", "peaks", "speeds", "used_categories"]

Runs = Mapping[str, Mapping[str, Any]]  # reports by name

_PEAKS = {
    "allocated": "allocated",
    "reserved": "reserved",
    "nvml_device": "NVML, device",
    "nvml_process": "NVML, process",
    "host": "host",
}


def differing(runs: Runs) -> Table | None:
    """What is not set alike in all runs; None where there is nothing of that kind."""
    settings = {name: settings_of(report) for name, report in runs.items()}
    keys = dict.fromkeys(key for one in settings.values() for key in one)
    kept = [key for key in keys if len({one.get(key) for one in settings.values()}) > 1]
    if not kept:
        return None
    return Table(["run", *kept], [[name, *(one.get(key, "-") for key in kept)] for name, one in settings.items()])


def peaks(runs: Runs) -> Table:
    """What each meter saw of the fullest rank, and what was predicted of it."""
    found = {name: (fullest(report)["peaks"], report.get("predicted") or {}) for name, report in runs.items()}
    head = ["run"]
    columns: list[list[str]] = []
    for key, label in _PEAKS.items():
        head.append(label)
        columns.append([shown(meters[key]) for meters, _ in found.values()])
        total = {"allocated": "allocated", "nvml_device": "total"}.get(key)  # what is predicted of it
        if total:
            head.append("predicted")
            columns.append([shown(predicted.get(total)) for _, predicted in found.values()])
        if key == "allocated":
            head.append("off by")
            columns.append([_off(predicted.get(total), meters[key]) for meters, predicted in found.values()])
    return Table(head, [[name, *cells] for name, cells in zip(found, zip(*columns))])


def bars(runs: Runs) -> list[Bar]:
    """Each run's fullest rank at its peak, its prediction after it."""
    found = []
    for name, report in runs.items():
        found.append(Bar(name, ordered(fullest(report)["breakdown"]["categories"])))
        if report.get("predicted"):
            found.append(Bar(name, ordered(report["predicted"]["categories"]), predicted=True))
    return found


def ordered(parts: Mapping[str, Any]) -> dict[str, Any]:
    """In the order of the categories."""
    return {name: parts[name] for name in CATEGORIES if name in parts}


def used_categories(stacks: Sequence[Bar]) -> list[str]:
    return [name for name in CATEGORIES if any(bar.parts.get(name) for bar in stacks)]


def breakdowns(runs: Runs) -> Table:
    """One unit for all, so that parts can be seen to add up; of one run a row for each category."""
    stacks = bars(runs)
    unit, used = unit_of([bar.total for bar in stacks]), used_categories(stacks)
    names = ["predicted" if bar.predicted else bar.label for bar in stacks]
    columns = [[unit.number(size, digits=3) for size in (*map(bar.parts.get, used), bar.total)] for bar in stacks]
    if len(runs) == 1:
        rows = [[name, *cells] for name, cells in zip([*used, "sum"], zip(*columns))]
        return Table([f"category, {unit.name}", *names], rows, summed=True)
    return Table([f"run, {unit.name}", *used, "sum"], [[name, *cells] for name, cells in zip(names, columns)])


def speeds(runs: Runs) -> Table | None:
    """Of the fullest rank; None where nothing was timed."""
    found = {name: speed(report) for name, report in runs.items()}
    if not any(found.values()):
        return None
    rows = [
        [name, *(metric.text(one[key]) if key in one else "-" for key, metric in METRICS.items())]
        for name, one in found.items()
    ]
    return Table(["run", *(metric.label for metric in METRICS.values())], rows)


def over_ranks(report: Mapping[str, Any]) -> Section | None:
    """Least and most over the ranks of a run, each with the rank; None where there is one rank."""
    ranks = report["ranks"]
    if len(ranks) == 1:
        return None
    rows = []
    for key, label in _PEAKS.items():
        sizes = {rank["rank"]: rank["peaks"][key] for rank in ranks if rank["peaks"][key] is not None}
        if sizes:
            rows.append([label, *_ends(sizes, shown)])
    for key, metric in METRICS.items():
        found = {rank["rank"]: one[key] for rank in ranks if key in (one := speed_of_rank(rank))}
        if found:
            rows.append([metric.label, *_ends(found, metric.text)])
    return Section(f"Over the {len(ranks)} ranks", [Table(["", "least", "rank", "most", "rank"], rows)], 3)


def _ends(values: Mapping[int, Any], text: Any) -> list[str]:
    least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return [text(values[least]), str(least), text(values[most]), str(most)]


def _off(predicted: int | None, measured: int | None) -> str:
    return f"{predicted / measured - 1:+.1%}" if predicted and measured else "-"
