"""A report as Markdown: for a terminal, a pull request or docs/."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ds_mofa.profiler.categories import CATEGORIES, MEANING, gb
from ds_mofa.profiler.layout import fullest

__all__ = ["LAYER_COLUMNS", "NO_STACK", "render"]

LAYER_COLUMNS = {
    "held": "in .grad of the matrices",
    "passed_on": "gradient passed on",
    "waiting": "output gradients waiting",
    "kept": "all else that this backward left",
    "largest": "its largest piece",
    "smallest_gradient": "smallest weight gradient",
    "layer_gradients": "all of the layer's",
}
NO_STACK = "autograd's own C++ (no Python frame), or stacks were not recorded"


def render(
    runs: Mapping[str, dict[str, Any]],
    claims: Sequence[Mapping[str, Any]],
    title: str,
    document: Mapping[str, Any],
    pictures: Sequence[str],
) -> str:
    """One text for one or several runs; sizes in GB of 1e9 bytes."""
    good = {name: report for name, report in runs.items() if "ranks" in report}
    lines = [f"# {title}", "", "GB are 1e9 bytes, of the fullest rank.", ""]
    if document.get("command"):
        lines += ["```", shlex.join(map(str, document["command"])), "```", ""]
    if claims:
        lines += ["## Verdict", "", "| claim | measured | verdict |", "| --- | --- | --- |"]
        lines += [f"| {c['claim']} | {c['measured']} | **{c['verdict']}** |" for c in claims]
        lines.append("")
    if good:
        lines += ["## Peaks", "", *_peaks(good), "", "## The peak by category", "", *_breakdowns(good), ""]
        lines += ["", *(f"- {name}: {MEANING[name]}" for name in _categories(good)), ""]
    for name in pictures:
        lines += [f"![{name}]({name})", ""]
    for name, report in good.items():
        lines += [f"## {name}", "", *_run(report), ""]
    failed = {name: report for name, report in runs.items() if "ranks" not in report}
    if failed:
        lines += ["## Not measured", "", *(f"- {name}: {report['error']}" for name, report in failed.items()), ""]
    notes = list(dict.fromkeys([*document.get("notes", ()), *(n for r in good.values() for n in r["notes"])]))
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * (len(head) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _peaks(runs: Mapping[str, dict[str, Any]]) -> list[str]:
    head = ["run", "allocated", "predicted", "off by", "reserved", "NVML, device", "NVML, process", "predicted", "host"]
    rows = []
    for name, report in runs.items():
        peaks, predicted = fullest(report)["peaks"], report.get("predicted") or {}
        rows.append(
            [
                name,
                gb(peaks["allocated"]),
                gb(predicted.get("allocated")),
                _off(predicted.get("allocated"), peaks["allocated"]),
                gb(peaks["reserved"]),
                gb(peaks["nvml_device"]),
                gb(peaks["nvml_process"]),
                gb(predicted.get("total")),
                gb(peaks["host"]),
            ]
        )
    return _table(head, rows)


def _off(predicted: int | None, measured: int | None) -> str:
    return f"{predicted / measured - 1:+.1%}" if predicted and measured else "-"


def _categories(runs: Mapping[str, dict[str, Any]]) -> list[str]:
    used = set()
    for report in runs.values():
        used |= set(fullest(report)["breakdown"]["categories"]) | set(
            (report.get("predicted") or {}).get("categories", ())
        )
    return [name for name in CATEGORIES if name in used]


def _breakdowns(runs: Mapping[str, dict[str, Any]]) -> list[str]:
    head, columns = ["category"], []
    for name, report in runs.items():
        head.append(name)
        columns.append(fullest(report)["breakdown"]["categories"])
        if report.get("predicted"):
            head.append("predicted")
            columns.append(report["predicted"]["categories"])
    rows = [[category, *(gb(c.get(category, 0), 3) for c in columns)] for category in _categories(runs)]
    rows.append(["**sum**", *(f"**{gb(sum(c.values()), 3)}**" for c in columns)])
    return _table(head, rows)


def _run(report: Mapping[str, Any]) -> list[str]:
    rank = fullest(report)
    lines = [f"{rank['device']}, rank {rank['rank']} of {len(report['ranks'])}, {rank['steps']} steps. "]
    seconds = sorted(rank["step_seconds"])
    if seconds:
        lines[0] += (
            f"{seconds[len(seconds) // 2] * 1e3:.1f} ms a step (median); the profiler took "
            f"{rank['overhead']['share_of_step']:.2%} of it. "
        )
    lines[0] += f"The sum is of: {rank['breakdown']['meter']}."
    if rank["phases"]:
        head = ["phase", "times", "host ms each", "peak allocated", "peak reserved", "peak host"]
        rows = [
            [
                phase["name"],
                f"{phase['count']:.0f}",
                f"{phase['seconds'] / phase['count'] * 1e3:.2f}" if phase["count"] else "-",
                *(gb(phase[key] or None) for key in ("peak_allocated", "peak_reserved", "peak_host")),
            ]
            for phase in rank["phases"]
        ]
        lines += ["", *_table(head, rows)]
    if rank["phase_peaks"]:
        used = [name for name in CATEGORIES if any(name in p["breakdown"] for p in rank["phase_peaks"])]
        rows = [
            [p["name"], gb(p["allocated"]), *(gb(p["breakdown"].get(c, 0)) for c in used)] for p in rank["phase_peaks"]
        ]
        lines += ["", "What was alive at the peak of each phase, in the step that was recorded:", ""]
        lines += _table(["phase", "all", *used], rows)
    if rank["layers"]:
        worst = max(rank["layers"], key=lambda entry: entry["largest"])
        head = ["layer", *LAYER_COLUMNS.values()]
        rows = [[e["layer"], *(f"{e[key] / 1e6:.3f}" for key in LAYER_COLUMNS)] for e in _ends(rank["layers"])]
        lines += ["", f"When the backward of each of {len(rank['layers'])} layers is done, in MB (1e6 bytes):", ""]
        lines += [*_table(head, rows), "", f"The largest piece left, {worst['largest'] / 1e6:.3f} MB, comes from:", ""]
        lines += ["```", *(worst["stack"] or [NO_STACK]), "```"]
    return lines


def _ends(entries: Sequence[Any]) -> list[Any]:
    """The first and last few of many."""
    return list(entries) if len(entries) <= 8 else [*entries[:3], *entries[-3:]]
