"""A chart as HTML: lines in an SVG that stretches with the page, all text over it, so that it keeps its size on a
narrow screen.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

from experiments.comparison.curves import Chart, Series

__all__ = ["STYLE", "draw"]

STYLE = """
.chart{position:relative;margin:.6rem .8rem 0 3.6rem;height:15rem;border-left:1px solid var(--line);
border-bottom:1px solid var(--line)}
.chart svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.chart polyline{fill:none;stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.chart polygon{opacity:.16}
.chart span{position:absolute;font-size:.75rem;color:var(--soft);white-space:nowrap}
.chart .y{right:calc(100% + .4rem);transform:translateY(50%)}
.chart .x{top:calc(100% + .25rem);transform:translateX(-50%)}
.chart .grid{left:0;right:0;border-top:1px dashed var(--line)}
.axis{margin:1.4rem .8rem 0 3.6rem;text-align:center;font-size:.8rem;color:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;padding:0;margin:.5rem 0 0 3.6rem;list-style:none;font-size:.85rem}
.legend i{display:inline-block;width:1.1em;height:.25em;border-radius:2px;margin-right:.4em;vertical-align:middle}
"""

_SIDE = 1000  # of the SVG's own square


def draw(chart: Chart) -> str:
    """The chart with its axes and its legend."""
    place = math.log10 if chart.log_x else float
    left, right = _limits([place(x) for series in chart.series for x in series.x], share=0.0)
    bottom, top = _limits([y for series in chart.series for y in (*series.low, *series.high)], share=0.05)

    def across(x: float) -> float:
        return (place(x) - left) / (right - left)

    def up(y: float) -> float:
        return (y - bottom) / (top - bottom)

    x_ticks = _log_ticks(10**left, 10**right) if chart.log_x else _ticks(left, right)
    y_ticks = _ticks(bottom, top)
    digits = _digits(y_ticks)
    marks = "".join(
        f'<span class="grid" style="bottom:{up(y):.2%}"></span><span class="y" style="bottom:{up(y):.2%}">'
        f"{y:.{digits}f}</span>"
        for y in y_ticks
    ) + "".join(f'<span class="x" style="left:{across(x):.2%}">{x:g}</span>' for x in x_ticks)
    lines = "".join(_line(series, across, up) for series in chart.series)
    legend = "".join(f'<li><i style="background:{s.color}"></i>{escape(s.label)}</li>' for s in chart.series)
    return (
        f'<div class="figure"><h3>{escape(chart.title)}</h3><div class="chart">{marks}'
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(chart.title)}">{lines}</svg></div><p class="axis">{escape(chart.x_label)}</p>'
        f'<ul class="legend">{legend}</ul></div>'
    )


def _line(series: Series, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    def points(xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{across(x) * _SIDE:.1f},{(1 - up(y)) * _SIDE:.1f}" for x, y in zip(xs, ys))

    band = points(series.x, series.high) + " " + points(series.x[::-1], series.low[::-1])
    return (
        f'<polygon fill="{series.color}" points="{band}"/><polyline stroke="{series.color}" '
        f'points="{points(series.x, series.mean)}"><title>{escape(series.label)}</title></polyline>'
    )


def _limits(values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of an axis, wider than the values by a share of it, and never of no width."""
    low, high = min(values), max(values)
    margin = share * (high - low) or (0.0 if high > low else abs(high) * 0.05 or 1.0)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from ``low`` to ``high``."""
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(size * magnitude for size in (1, 2, 5, 10) if size * magnitude >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1 and 3 times the powers of ten from ``low`` to ``high``; the ends where there are fewer than two of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{mantissa}e{power}") for power in powers for mantissa in (1, 3)]
    inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return inside if len(inside) > 1 else [float(f"{low:.2g}"), float(f"{high:.2g}")]


def _digits(ticks: Sequence[float]) -> int:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return max(0, -math.floor(math.log10(step) + 1e-9))
