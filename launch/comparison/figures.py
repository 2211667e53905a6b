"""The charts of a comparison as PNG, by matplotlib (the extra "compare")."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from launch.comparison.curves import Chart

__all__ = ["write_figures"]


def write_figures(drawn: Sequence[Chart], folder: Path) -> list[Path]:
    """A PNG for each chart; returns the files."""
    return [_write(chart, folder / f"{chart.name}.png") for chart in drawn]


def _write(chart: Chart, path: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(8.4, 4.6), layout="constrained")
    for series in chart.series:
        marker = "o" if len(series.x) <= 12 else None
        axes.plot(series.x, series.mean, color=series.color, label=series.label, linewidth=1.8, marker=marker, ms=4)
        axes.fill_between(series.x, series.low, series.high, color=series.color, alpha=0.15, linewidth=0)
    if chart.log_x:
        axes.set_xscale("log")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.set_title(chart.title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=min(5, len(chart.series)), fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
