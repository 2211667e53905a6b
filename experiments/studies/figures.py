"""The figures of a study as PNG, by matplotlib (the extra "compare")."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from experiments.comparison.curves import COLORS, Chart

__all__ = ["COLORS", "draw_cost", "draw_panels"]


def draw_panels(charts: Sequence[Chart], columns: int, path: Path) -> Path:
    """Charts side by side on one scale, with one legend: a color means the same in each."""
    rows = -(-len(charts) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(1.2 + 3.1 * columns, 0.8 + 2.7 * rows), layout="constrained", sharey=True, squeeze=False
    )
    handles = {}
    for axes, chart in zip(grid.flat, charts):
        for series in chart.series:
            [line] = axes.plot(series.x, series.mean, color=series.color, linewidth=1.8)
            if list(series.low) != list(series.high):
                axes.fill_between(series.x, series.low, series.high, color=series.color, alpha=0.13, linewidth=0)
            handles.setdefault(series.label, line)
        axes.set_title(chart.title, loc="left", fontsize=10)
        axes.set_xlabel(chart.x_label)
        _plain(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel(charts[0].y_label)
    grid[0, 0].set_ylim(0, 1.04 * max(value for chart in charts for series in chart.series for value in series.high))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False)
    return _saved(figure, path)


def draw_cost(costs: Sequence[Mapping[str, Any]], lines: Sequence[tuple[str, float]], y_label: str, path: Path) -> Path:
    """Final loss against captured energy: the best rate full, the others pale; ``lines`` are losses to compare with."""
    figure, axes = pyplot.subplots(figsize=(7.4, 4.6), layout="constrained")
    for color, label in zip(COLORS, dict.fromkeys(point["label"] for point in costs)):
        own = [point for point in costs if point["label"] == label and point["best"] is not None]
        for point in own:
            others = [loss for loss in point["loss"].values() if loss is not None]
            axes.plot([_x(point)] * len(others), others, "o", color=color, alpha=0.3, ms=5)
        x, y = [_x(point) for point in own], [point["loss"][point["best"]] for point in own]
        axes.plot(x, y, "o-", color=color, linewidth=1.6, ms=6, label=label)
        for point, left, up in zip(own, x, y):
            name = "full rank" if point["rank"] is None else f"r = {point['rank']}"
            axes.annotate(name, (left, up), xytext=(-9, -4), textcoords="offset points", ha="right", fontsize=9)
    for color, (label, value) in zip(COLORS[::-1], lines):
        axes.axhline(value, color=color, linestyle="--", linewidth=1.4, label=label)
    axes.set_xlabel("energy of the exact momentum that the top r directions hold, %")
    axes.set_ylabel(y_label)
    axes.margins(x=0.1, y=0.12)
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return _saved(figure, path)


def _x(point: Mapping[str, Any]) -> float:
    return 100 * point["captured"]


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120, facecolor="white")
    pyplot.close(figure)
    return path
