"""The report of one or several runs' memory: what it says, and its files."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_mofa.profiler.categories import CATEGORIES, MEANING
from ds_mofa.profiler.layout import fullest
from ds_mofa.profiler.report import comparing
from ds_mofa.profiler.report.charts import Areas, Bars, Phase
from ds_mofa.profiler.report.comparing import Runs, ordered
from ds_mofa.profiler.report.data import check
from ds_mofa.profiler.report.document import Claims, Code, Document, Figure, Points, Section, Table, Text
from ds_mofa.profiler.report.rendering import NO_MATPLOTLIB, drawing_or_none, write
from ds_mofa.profiler.report.units import shown, unit_of

__all__ = ["write_pages", "write_report"]

_LAYER_COLUMNS = {
    "held": "in .grad of the matrices",
    "passed_on": "gradient passed on",
    "waiting": "output gradients waiting",
    "kept": "all else that this backward left",
    "largest": "its largest piece",
    "smallest_gradient": "smallest weight gradient",
    "layer_gradients": "all of the layer's",
}
_NO_STACK = "autograd's own C++ (no Python frame), or stacks were not recorded"


def write_report(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write report.json, report.md, report.html and, with matplotlib, a PNG of each figure; returns the files.

    Raises:
        ValueError: see :func:`ds_mofa.profiler.report.data.check`.
    """
    check(report)
    return write_pages({report["setting"].get("name", "run"): report}, folder, report)


def write_pages(
    runs: Runs,
    folder: str | Path,
    data: dict[str, Any],
    claims: Sequence[Mapping[str, Any]] = (),
    title: str | None = None,
) -> list[Path]:
    """Write one or several runs side by side.

    Args:
        runs: reports by name, or ``{"error": why there is none}``.
        folder: made where it is missing.
        data: what report.json holds.
        claims: verdicts, see ``profiling/verify_claim.py``.
        title: of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if drawing_or_none() is None:
        data.setdefault("notes", []).append(NO_MATPLOTLIB)
    (folder / "report.json").write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")
    document = _document(runs, data, claims, title or "Memory of a training run")
    return [folder / "report.json", *write(document, folder, "report.md")]


def _document(runs: Runs, data: Mapping[str, Any], claims: Sequence[Mapping[str, Any]], title: str) -> Document:
    good = {name: report for name, report in runs.items() if "ranks" in report}
    sections = [Section("", [Code(shlex.join(map(str, data["command"])))])] if data.get("command") else []
    if claims:
        sections.append(Section("Verdict", [Claims(claims)]))
    if good:
        sections += _side_by_side(good)
    for name, report in good.items():
        sections += _run(name, report)
    failed = [f"{name}: {report['error']}" for name, report in runs.items() if "ranks" not in report]
    if failed:
        sections.append(Section("Not measured", [Points(failed)]))
    notes = list(dict.fromkeys([*data.get("notes", ()), *(note for r in good.values() for note in r["notes"])]))
    if notes:
        sections.append(Section("Notes", [Points(notes)]))
    return Document(title, _subtitle(good, data), sections)


def _side_by_side(good: Runs) -> list[Section]:
    bars = comparing.bars(good)
    meanings = [f"{name}: {MEANING[name]}" for name in comparing.used_categories(bars)]
    differing = comparing.differing(good) if len(good) > 1 else None
    speeds = comparing.speeds(good)
    return [
        *([Section("What differs", [differing])] if differing else []),
        Section("Peaks", [comparing.peaks(good)]),
        *([Section("Speed and energy, of the fullest rank", [speeds])] if speeds else []),
        Section(
            "The peak by category",
            [Figure(Bars("peak", "The peak of the fullest rank", bars)), comparing.breakdowns(good)],
        ),
        Section("What the categories are", [Points(meanings)], 3, folded=True),
    ]


def _subtitle(good: Runs, data: Mapping[str, Any]) -> str:
    devices = sorted({rank["device"] for report in good.values() for rank in report["ranks"]})
    versions: Mapping[str, Any] = next((report["environment"] for report in good.values()), {})
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "deepspeed", "transformers") if name in versions)
    date = str(data.get("created") or "")[:10]
    said = [", ".join(devices), known, date, "bytes of the fullest rank, a GB being 1e9 of them"]
    return " · ".join(filter(None, said))


def _run(name: str, report: Mapping[str, Any]) -> list[Section]:
    rank = fullest(report)
    slug = re.sub(r"[^A-Za-z0-9.=-]+", "_", name).strip("_")
    blocks: list = [Text(_summary(report, rank))]
    blocks += [Figure(chart) for chart in (_step_chart(name, slug, rank), _run_chart(name, slug, rank)) if chart]
    sections = [Section(name, blocks)]
    ranks = comparing.over_ranks(report)
    if ranks is not None:
        sections.append(ranks)
    if rank.get("peak"):
        sections += _at_peak(rank["peak"])
    if rank["phases"]:
        sections.append(Section("Phases", [_phases(rank["phases"])], 3))
    if rank["phase_peaks"]:
        title = "What was alive at the peak of each phase, in the step that was recorded"
        sections.append(Section(title, [_phase_peaks(rank["phase_peaks"])], 3, folded=True))
    if rank["layers"]:
        title = f"When the backward of each of {len(rank['layers'])} layers is done"
        sections.append(Section(title, _layers(rank["layers"]), 3, folded=True))
    return sections


def _at_peak(peak: Mapping[str, Any]) -> list[Section]:
    """The allocation that made it with its stack, and the largest pieces with the line that is the program's own."""
    made = peak["allocation"]
    sections = []
    if made is not None:
        phase = f" in {peak['phase']}" if peak["phase"] else ""
        text = f"{shown(made['size'])} of {made['category']}{phase} made the peak, allocated by:"
        sections.append(Section("The stack at the peak", [Text(text), Code("\n".join(made["stack"]) or _NO_STACK)], 3))
    rows = [
        [_own_line(piece["stack"]), piece["category"], shown(piece["size"]), str(piece["count"])]
        for piece in peak["pieces"]
    ]
    table = Table(["allocated at", "category", "bytes", "pieces"], rows)
    return [*sections, Section("The largest pieces at the peak", [table], 3, folded=True)]


def _own_line(stack: Sequence[str]) -> str:
    """The innermost line that is not of a library, or the innermost of all."""
    own = (line for line in stack if "/site-packages/" not in line and ":" in line and "<frozen" not in line)
    line = next(own, stack[0] if stack else "before the step, or no stack")
    return line if len(line) <= 80 else "..." + line[-77:]


def _summary(report: Mapping[str, Any], rank: Mapping[str, Any]) -> str:
    text = f"{rank['device']}, rank {rank['rank']} of {len(report['ranks'])}, {rank['steps']} steps. "
    seconds = sorted(rank["step_seconds"])
    if seconds:
        text += (
            f"{seconds[len(seconds) // 2] * 1e3:.1f} ms a step (median); the profiler took "
            f"{rank['overhead']['share_of_step']:.2%} of it. "
        )
    return text + f"The sum is of: {rank['breakdown']['meter']}."


def _step_chart(name: str, slug: str, rank: Mapping[str, Any]) -> Areas | None:
    """Allocation by allocation."""
    step = rank["step_timeline"]
    if step is None:
        return None
    phases = [Phase(phase["name"], phase["start"], phase["end"]) for phase in step["phases"]]
    return Areas(
        f"step_{slug}",
        f"{name}: one step",
        "ms",
        step["milliseconds"],
        ordered(step["categories"]),
        step["peak_milliseconds"],
        phases,
    )


def _run_chart(name: str, slug: str, rank: Mapping[str, Any]) -> Areas | None:
    """By the meters: what is allocated, what is reserved beyond it, what lies outside."""
    timeline = rank["timeline"]
    if len(timeline["seconds"]) < 2:
        return None
    if any(value is not None for value in timeline["allocated"]):
        allocated = [value or 0 for value in timeline["allocated"]]
        reserved = [max(value or 0, a) for value, a in zip(timeline["reserved"], allocated)]
        layers = {"allocated": allocated, "allocator slack": [r - a for r, a in zip(reserved, allocated)]}
        if any(value is not None for value in timeline["nvml_device"]):
            seen = timeline["nvml_device"]
            layers["outside the allocator"] = [max(0, (n or 0) - r) for n, r in zip(seen, reserved)]
    else:
        layers = {"resident set": timeline["host"]}
    return Areas(f"run_{slug}", f"{name}: the whole run", "s", timeline["seconds"], layers)


def _phases(phases: Sequence[Mapping[str, Any]]) -> Table:
    peaks = {"peak_allocated": "peak allocated", "peak_reserved": "peak reserved", "peak_host": "peak host"}
    rows = [
        [
            phase["name"],
            f"{phase['count']:.0f}",
            f"{phase['seconds'] / phase['count'] * 1e3:.2f}" if phase["count"] else "-",
            *(shown(phase[key] or None) for key in peaks),
        ]
        for phase in phases
    ]
    return Table(["phase", "times", "host ms each", *peaks.values()], rows)


def _phase_peaks(peaks: Sequence[Mapping[str, Any]]) -> Table:
    unit = unit_of([peak["allocated"] for peak in peaks])
    used = [name for name in CATEGORIES if any(peak["breakdown"].get(name) for peak in peaks)]
    rows = [
        [peak["name"], *(unit.number(size) for size in (peak["allocated"], *map(peak["breakdown"].get, used)))]
        for peak in peaks
    ]
    return Table([f"phase, {unit.name}", "all", *used], rows)


def _layers(entries: Sequence[Mapping[str, Any]]) -> list[Table | Text | Code]:
    unit = unit_of([entry[key] for entry in entries for key in _LAYER_COLUMNS])
    ends = entries if len(entries) <= 8 else [*entries[:3], *entries[-3:]]
    rows = [[entry["layer"], *(unit.number(entry[key], digits=3) for key in _LAYER_COLUMNS)] for entry in ends]
    worst = max(entries, key=lambda entry: entry["largest"])
    return [
        Table([f"layer, {unit.name}", *_LAYER_COLUMNS.values()], rows),
        Text(f"The largest piece left, {shown(worst['largest'])}, comes from:"),
        Code("\n".join(worst["stack"]) or _NO_STACK),
    ]
