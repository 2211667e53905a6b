"""The figures of a study as PNG, by matplotlib (the extra "compare")."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ds_mofa.profiler.report.charts import Lines
from ds_mofa.profiler.report.drawing import finish, handle_of, plot_line, save_png
from ds_mofa.profiler.report.styles import styles_of

__all__ = ["draw_cost", "draw_panels"]


def draw_panels(charts: Sequence[Lines], columns: int, path: Path) -> Path:
    """Charts side by side on one scale, with one legend: a style means the same in each."""
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(1.2 + 3.1 * columns, 0.8 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    handles = {}
    for axes, chart in zip(grid.flat, charts):
        for series in chart.series:
            plot_line(axes, series)
            handles.setdefault(series.label, handle_of(series))
        axes.set_title(chart.title, loc="left", fontsize=10)
        axes.set_xlabel(chart.x_label)
        finish(figure, axes, grid=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(charts[0].y_label)
    grid[0, 0].set_ylim(0, 1.04 * max(value for chart in charts for series in chart.series for value in series.high))
    columns = min(7, len(handles))
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=columns, frameon=False)
    return save_png(figure, path)


def draw_cost(costs: Sequence[Mapping[str, Any]], lines: Sequence[tuple[str, float]], y_label: str, path: Path) -> Path:
    """Final loss against captured energy: the best rate full, the others pale; ``lines`` are losses to compare with."""
    figure = Figure(figsize=(7.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    labels = [*dict.fromkeys(point["label"] for point in costs), *(label for label, _ in lines)]
    styles = styles_of(labels, labels)
    for label in labels[: len(labels) - len(lines)]:
        style = styles[label]
        own = [point for point in costs if point["label"] == label and point["best"] is not None]
        for point in own:
            others = [loss for loss in point["loss"].values() if loss is not None]
            axes.plot([_x(point)] * len(others), others, style.marker, color=style.color, alpha=0.3, ms=5)
        x, y = [_x(point) for point in own], [point["loss"][point["best"]] for point in own]
        drawn = {"color": style.color, "linestyle": style.dash, "marker": style.marker, "linewidth": 1.6}
        axes.plot(x, y, ms=6, label=label, **drawn)
        for point, left, up in zip(own, x, y):
            name = "full rank" if point["rank"] is None else f"r = {point['rank']}"
            axes.annotate(name, (left, up), xytext=(-9, -4), textcoords="offset points", ha="right", fontsize=9)
    for label, value in lines:
        axes.axhline(value, color=styles[label].color, linestyle=styles[label].dash, linewidth=1.4, label=label)
    axes.set_xlabel("energy of the exact momentum that the top r directions hold, %")
    axes.set_ylabel(y_label)
    axes.margins(x=0.1, y=0.12)
    finish(figure, axes, grid=True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return save_png(figure, path)


def _x(point: Mapping[str, Any]) -> float:
    return 100 * point["captured"]
