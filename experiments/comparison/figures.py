"""The charts of a comparison as PNG, by matplotlib (the extra "compare")."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from experiments.comparison.curves import Chart

__all__ = ["write_figures"]

_LINES = ("-", "--", ":", "-.")  # series of one colour differ in these
_LEGEND = 110  # letters that a row of it holds


def write_figures(drawn: Sequence[Chart], folder: Path) -> list[Path]:
    """A PNG for each chart; returns the files."""
    return [_write(chart, folder / f"{chart.name}.png") for chart in drawn]


def _write(chart: Chart, path: Path) -> Path:
    longest = max((len(series.label) for series in chart.series), default=0)
    columns = max(1, min(5, len(chart.series), _LEGEND // (longest + 8)))
    rows = -(-len(chart.series) // columns)
    figure, axes = pyplot.subplots(figsize=(8.4, 4.4 + 0.2 * rows), layout="constrained")
    colors = [series.color for series in chart.series]
    for i, series in enumerate(chart.series):
        style = {
            "marker": "o" if len(series.x) <= 12 else None,
            "linestyle": _LINES[colors[:i].count(series.color) % len(_LINES)],
        }
        axes.plot(series.x, series.mean, color=series.color, label=series.label, linewidth=1.8, ms=4, **style)
        axes.fill_between(series.x, series.low, series.high, color=series.color, alpha=0.15, linewidth=0)
    if chart.log_x:
        axes.set_xscale("log")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.set_title(chart.title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
