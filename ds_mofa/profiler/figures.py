"""The figures of a report as PNG, by matplotlib (the extra "profile")."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from ds_mofa.profiler.categories import axis_unit, gb
from ds_mofa.profiler.layout import COLORS, DARK, bars, fullest, stacked_run, stacked_step

__all__ = ["write"]

_DPI = 130
_INK, _SOFT = "#1c2128", "#5b6470"


def write(runs: Mapping[str, dict[str, Any]], folder: Path) -> list[Path]:
    """peak.png of all runs side by side, and for each run its step and its whole; returns the files."""
    good = {name: report for name, report in runs.items() if "ranks" in report}
    if not good:
        return []
    files = [_peak(good, folder / "peak.png")]
    for name, report in good.items():
        rank = fullest(report)
        slug = re.sub(r"[^A-Za-z0-9.=-]+", "_", name).strip("_")
        step = stacked_step(rank)
        if step is not None:
            times, layers, phases, peak = step
            files.append(_area(f"{name}: one step", times, layers, "ms", folder / f"step_{slug}.png", peak, phases))
        times, layers = stacked_run(rank)
        if len(times) > 1:
            files.append(_area(f"{name}: the whole run", times, layers, "s", folder / f"run_{slug}.png"))
    return files


def _peak(good: Mapping[str, dict[str, Any]], path: Path) -> Path:
    shown = bars(good)
    figure, axes = pyplot.subplots(figsize=(9.2, 1.5 + 0.52 * len(shown)), layout="constrained")
    full = max(sum(max(0, size) for size in bar.parts.values()) for bar in shown)
    for row, bar in enumerate(shown):
        left = 0.0
        for name, size in bar.parts.items():
            width = max(0, size) / 1e9
            predicted = bar.kind == "predicted"
            axes.barh(
                row, width, left=left, height=0.5 if predicted else 0.74, color=COLORS[name],
                alpha=0.72 if predicted else 1, edgecolor="white", linewidth=0.7,
            )  # fmt: skip
            if width > full / 1e9 * 0.055:
                text = gb(size, 1 if full >= 5e9 else 2)
                ink = "white" if name in DARK else "#10151b"
                axes.text(left + width / 2, row, text, ha="center", va="center", fontsize=8, color=ink)
            left += width
        axes.text(left + full / 1e9 * 0.008, row, f"{gb(bar.total)} GB", va="center", fontsize=9, color=_INK)
    names = [bar.label if bar.kind == "measured" else "predicted" for bar in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, full / 1e9 * 1.12)
    axes.set_xlabel("GB (1e9 bytes)")
    axes.set_title("The peak by category, fullest rank", loc="left", fontsize=11, color=_INK)
    used = [name for name in COLORS if any(name in bar.parts for bar in shown)]
    _finish(figure, axes, used)
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
    return path


def _area(
    title: str,
    times: Sequence[float],
    layers: Mapping[str, Sequence[int]],
    unit: str,
    path: Path,
    peak: float | None = None,
    phases: Sequence[Mapping[str, Any]] = (),
) -> Path:
    figure, axes = pyplot.subplots(figsize=(9.2, 4.4), layout="constrained")
    unit_size, unit_name = axis_unit(max(map(sum, zip(*layers.values()))))
    columns = [[max(0, size) / unit_size for size in column] for column in layers.values()]
    axes.stackplot(times, columns, colors=[COLORS[name] for name in layers], linewidth=0)
    totals = [sum(values) for values in zip(*columns)]
    top = max(totals) or 1
    axes.set_xlim(times[0], times[-1])
    axes.set_ylim(0, top * (1.16 if phases else 1.08))
    axes.set_xlabel(unit)
    axes.set_ylabel(f"{unit_name} ({unit_size:.0e} bytes)".replace("+0", ""))
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    span = times[-1] - times[0]
    for phase in phases:
        width = phase["end"] - phase["start"]
        dark = phase["name"] == "backward"
        axes.axvspan(
            phase["start"], phase["end"], ymin=0.955, ymax=1, color="#8a94a0" if dark else "#d9dee4", linewidth=0
        )
        if width > 0.085 * span:
            axes.text(
                phase["start"] + width / 2, top * 1.134, phase["name"], ha="center", va="center", fontsize=7, color=_INK
            )
    if peak is not None:
        axes.axvline(peak, color=_INK, linewidth=0.8)
        side = "right" if peak - times[0] > 0.75 * span else "left"
        axes.text(peak, top * 1.03, f" peak {top:.2f} {unit_name} ", ha=side, fontsize=8, color=_INK)
    _finish(figure, axes, list(layers))
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
    return path


def _finish(figure, axes, names: Sequence[str]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_SOFT, labelsize=9)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), fontsize=8, frameon=False)
