"""Charts drawn by matplotlib (the extra "profile"), as a PNG or as SVG for a page. Needs no display, and no pyplot."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from ds_mofa.profiler.report.charts import Areas, Bars, Chart, Lines, Series
from ds_mofa.profiler.report.styles import AREA_COLORS, INK, PAPER, SOFT
from ds_mofa.profiler.report.units import shown, unit_of

__all__ = ["draw", "finish", "handle_of", "plot_line", "save_png", "svg"]

# Inches. Of a page's figure they are the width of a phone's screen, so that its text is not shrunk there.
WIDE, NARROW = 9.2, 5.6
_DPI = 130
_SIZES: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10.5, "axes.labelsize": 9}
_LABEL = 8  # points
# Ids from the content alone, and text as text: the same chart gives the same bytes, and a page's font.
_SVG: dict[Any, Any] = {"svg.hashsalt": "ds_mofa", "svg.fonttype": "none"}


def draw(chart: Chart, width: float = WIDE) -> Figure:
    """The figure of a chart, ``width`` inches wide and as high as it needs."""
    with matplotlib.rc_context(_SIZES):
        if isinstance(chart, Lines):
            return _lines(chart, width)
        return _bars(chart, width) if isinstance(chart, Bars) else _areas(chart, width)


def save_png(figure: Figure, path: Path) -> Path:
    """All colours, on white."""
    figure.savefig(path, dpi=_DPI, facecolor="white")
    return path


def svg(chart: Chart) -> str:
    """A chart as an <svg> element for a page, whose text has the page's colours; the width is the page's."""
    text = io.StringIO()
    with matplotlib.rc_context(_SVG):
        draw(chart, NARROW).savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    found = found[found.index("<svg") :]
    found = re.sub(r"\s*<metadata>.*?</metadata>", "", found, flags=re.DOTALL)
    found = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"| (width|height)="[\d.]+pt"', "", found, count=5)
    found = found.replace("xlink:href", "href")
    # Several figures of a page must not share ids.
    found = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{chart.name}-", found)
    found = re.sub(r"(\d\.\d\d)\d+", r"\1", found)
    return found.replace(INK, "var(--ink)").replace(SOFT, "var(--soft)").replace(PAPER, "var(--paper)")


# ---------------------------------------------------------------------- lines


def plot_line(axes: Axes, series: Series) -> None:
    """A line with its dash and its marker, and its band."""
    style = series.style
    if style.strong and list(series.low) != list(series.high):
        axes.fill_between(series.x, series.low, series.high, color=style.color, alpha=0.11, linewidth=0)
    axes.plot(series.x, series.mean, markevery=max(1, len(series.x) // 10), **_drawn(series))


def handle_of(series: Series) -> Line2D:
    """The line of a legend."""
    return Line2D([], [], label=series.label, **_drawn(series))


def _drawn(series: Series) -> dict:
    color, dash, marker, strong = series.style
    return {
        "color": color,
        "linestyle": dash,
        "marker": marker,
        "linewidth": 1.8 if strong else 0.9,
        "markersize": 4.5 if strong else 3.5,
        "markeredgewidth": 0 if marker in "osD^vP" else 0.8,
        "zorder": 3 if strong else 2,
    }


def _lines(chart: Lines, width: float) -> Figure:
    pitch = _LABEL * 1.45 / 72  # inches from one label to the next
    height = max(0.48 * width, 1.1 + pitch * len(chart.series))
    figure, axes = _start(chart.title, width, height)
    for series in chart.series:
        plot_line(axes, series)
    if chart.log_x:
        axes.set_xscale("log")
        rates = [x for series in chart.series for x in series.x]
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if max(rates) > 12 * min(rates) else (1, 2, 3, 6)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if chart.ticks:
        axes.set_xticks(range(len(chart.ticks)), chart.ticks)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.margins(x=0.02)
    bottom, top = axes.get_ylim()
    ends = [(series.mean[-1] - bottom) / (top - bottom) for series in chart.series]
    for series, place in zip(chart.series, _apart(ends, pitch / (height - 0.9))):
        leader: dict[str, Any] = {"arrowstyle": "-", "color": series.style.color, "linewidth": 0.7, "alpha": 0.7}
        leader |= {"shrinkA": 0, "shrinkB": 2}
        end = series.x[-1], series.mean[-1]
        beside: dict[str, Any] = {"textcoords": "axes fraction", "annotation_clip": False}
        axes.annotate("", end, (1.012, place), arrowprops=leader, **beside)
        ink = INK if series.style.strong else SOFT
        axes.annotate(series.label, end, (1.032, place), va="center", fontsize=_LABEL, color=ink, **beside)
        # The line's own sample beside its label: the two are joined by more than a colour.
        axes.plot(1.02, place, transform=axes.transAxes, clip_on=False, **{**_drawn(series), "markersize": 4.5})
    return finish(figure, axes, grid=True)


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest to those wanted that are ``gap`` apart, or less where there is no room, and within 0 to 1.

    Nearest by least squares: less ``gap`` for each place below it, that is a regression by a line that never falls.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    pools: list[tuple[float, int]] = []  # sums of places that have to stand together, and how many
    for rank, i in enumerate(order):
        total, count = wanted[i] - rank * gap, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            total, count = total + pools[-1][0], count + pools.pop()[1]
        pools.append((total, count))
    highest = 1 - gap * (len(wanted) - 1)
    level = [min(max(total / count, 0.0), highest) for total, count in pools for _ in range(count)]
    places = {i: level[rank] + rank * gap for rank, i in enumerate(order)}
    return [places[i] for i in range(len(wanted))]


# ---------------------------------------------------------------------- bytes


def _bars(chart: Bars, width: float) -> Figure:
    count = len(chart.bars)
    names = [name for name in AREA_COLORS if any(bar.parts.get(name) for bar in chart.bars)]
    columns = max(1, int(width / 1.9))
    figure, axes = _start(chart.title, width, 0.9 + 0.46 * count + 0.2 * -(-len(names) // columns))
    full = max(sum(max(0, size) for size in bar.parts.values()) for bar in chart.bars) or 1
    unit = unit_of([full])
    for row, bar in enumerate(chart.bars):
        left, high = 0.0, 0.28 if bar.predicted else 0.42
        for name, size in bar.parts.items():
            share = max(0, size) / unit.bytes
            axes.barh(
                row, share, left=left, height=high, color=AREA_COLORS[name], alpha=0.75 if bar.predicted else 1,
                edgecolor=PAPER, linewidth=0.7,
            )  # fmt: skip
            if size > full * 0.6 / width and not bar.predicted:
                axes.text(left + share / 2, row, unit.number(size), **_inside(name), fontsize=_LABEL - 1)
            left += share
        label = f"{bar.label}, predicted" if bar.predicted else bar.label
        axes.text(0, row - high / 2 - 0.06, f"{label}: {shown(bar.total)}", fontsize=_LABEL, color=INK)
    axes.set_ylim(count - 0.55, -0.75)
    axes.set_yticks([])
    axes.set_xlim(0, full / unit.bytes * 1.02)
    axes.set_xlabel(unit.name)
    _key(figure, names, loc="outside lower left", ncols=columns)
    axes.spines["left"].set_visible(False)
    return finish(figure, axes)


def _areas(chart: Areas, width: float) -> Figure:
    figure, axes = _start(chart.title, width, 0.46 * width)
    names = [name for name, column in chart.layers.items() if any(size > 0 for size in column)]
    columns = [[max(0, size) for size in chart.layers[name]] for name in names]
    totals = [sum(sizes) for sizes in zip(*columns)]
    top = max(totals, default=0) or 1
    unit = unit_of([top])
    heights = [[size / unit.bytes for size in column] for column in columns]
    colors = [AREA_COLORS[name] for name in names]
    axes.stackplot(chart.x, heights, colors=colors, linewidth=0.3, edgecolor=PAPER)
    axes.set_xlim(chart.x[0], chart.x[-1])
    axes.set_ylim(0, top / unit.bytes * (1.16 if chart.phases else 1.08))
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(unit.name)
    span = chart.x[-1] - chart.x[0]
    for phase in chart.phases:
        length, shade = phase.end - phase.start, "#8a94a0" if phase.name == "backward" else "#d9dee4"
        axes.axvspan(phase.start, phase.end, ymin=0.945, ymax=1, color=shade, linewidth=0)
        if length / span * width > 0.075 * len(phase.name):
            axes.text(
                phase.start + length / 2, 0.972, phase.name, transform=axes.get_xaxis_transform(), ha="center",
                va="center", fontsize=_LABEL - 1, color="#10151b",
            )  # fmt: skip
    if chart.peak is not None:
        axes.axvline(chart.peak, color=INK, linewidth=0.8)
        side = "right" if chart.peak - chart.x[0] > 0.7 * span else "left"
        axes.text(chart.peak, top / unit.bytes * 1.025, f" peak {shown(top)} ", ha=side, fontsize=_LABEL, color=INK)
    _key(figure, names[::-1], loc="outside right upper")  # in the order in which they lie
    return finish(figure, axes)


def _inside(name: str) -> dict:
    """Text in an area, by how dark its colour is."""
    red, green, blue = (int(AREA_COLORS[name][i : i + 2], 16) for i in (1, 3, 5))
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 125
    return {"ha": "center", "va": "center", "color": "white" if dark else "#10151b"}


def _key(figure: Figure, names: Sequence[str], **options) -> None:
    patches = [Patch(color=AREA_COLORS[name], label=name) for name in names]
    figure.legend(handles=patches, fontsize=_LABEL, frameon=False, labelcolor=INK, handlelength=1.2, **options)


# ---------------------------------------------------------------------- what all have


def _start(title: str, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK)
    return figure, axes


def finish(figure: Figure, axes: Axes, grid: bool = False) -> Figure:
    """Nothing on the axes that no number needs."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelsize=8)
    axes.xaxis.label.set_color(SOFT)
    axes.yaxis.label.set_color(SOFT)
    if grid:
        axes.grid(alpha=0.25)
    return figure
