"""The charts of a comparison as data."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ds_mofa.profiler.report.charts import Lines, Series
from ds_mofa.profiler.report.styles import Style, styles_of
from experiments.comparison.summary import Outcome, Summary

__all__ = ["charts", "styles"]

_TRAIN_POINTS = 40


def styles(summary: Summary) -> dict[str, Style]:
    """How each optimizer is drawn, the same in all charts: in colour the YAML's first, and the best of the others."""
    plan = summary.plan
    sign = -1 if plan.task.higher_is_better else 1
    others = [label for label in plan.labels[1:] if summary.best[label].dev is not None]
    return styles_of(plan.labels, [plan.labels[0], *sorted(others, key=lambda o: sign * summary.best[o].dev.mean)])


def charts(summary: Summary, curves: bool = True) -> list[Lines]:
    """Of each optimizer's best setting: learning curves by step and by second; of all settings: the learning rates.

    Args:
        curves: without, the learning rates alone.
    """
    task = summary.plan.task
    best = {label: outcome for label, outcome in summary.best.items() if outcome.dev is not None}
    if not best:
        return []
    scale = 100 if task.percent else 1
    metric = f"dev {task.metric}" + (" (%)" if task.percent else "")
    seconds = "seconds of training after the second step" + f", up to {summary.jobs} runs at once" * (summary.jobs > 1)
    drawn = [
        _chart(summary, best, f"dev_{task.metric}_by_step", "step", metric, _evaluated(task.metric, "step", scale)),
        _chart(
            summary, best, f"dev_{task.metric}_by_second", seconds, metric,
            _evaluated(task.metric, "seconds", scale),
        ),
    ]  # fmt: skip
    if task.metric != "loss":
        drawn.append(_chart(summary, best, "dev_loss_by_step", "step", "dev loss", _evaluated("loss", "step", 1)))
    drawn.append(_chart(summary, best, "train_loss_by_step", "step", "training loss", _train_loss))
    rates = _rates(summary, metric, scale)
    return (drawn if curves else []) + ([rates] if rates.series else [])


Points = tuple[list[float], list[float]]  # x and y of one run


def _chart(
    summary: Summary,
    best: dict[str, Outcome],
    name: str,
    x_label: str,
    y_label: str,
    points: Callable[[dict[str, Any]], Points],
) -> Lines:
    drawn = styles(summary)
    series = []
    for label, outcome in best.items():
        runs = [points(row) for row in outcome.rows]
        x = [statistics.fmean(values) for values in zip(*(x for x, _ in runs))]
        series.append(_band(label, drawn[label], x, list(zip(*(y for _, y in runs)))))
    return Lines(name, f"{y_label} by {name.rpartition('_')[2]}", x_label, y_label, series)


def _band(label: str, style: Style, x: Sequence[float], values: Sequence[Sequence[float]]) -> Series:
    means = [statistics.fmean(v) for v in values]
    return Series(label, style, x, means, [min(v) for v in values], [max(v) for v in values])


def _evaluated(metric: str, x: str, scale: float) -> Callable[[dict[str, Any]], Points]:
    def points(row: dict[str, Any]) -> Points:
        # The evaluation before the first step is the same for all, and would squeeze the rest.
        entries = row["evaluations"][1:]
        start = row.get("compiling_seconds", 0.0) if x == "seconds" else 0
        return [entry[x] - start for entry in entries], [scale * entry[metric] for entry in entries]

    return points


def _train_loss(row: dict[str, Any]) -> Points:
    """Means over stretches of steps: single batches are noise."""
    losses = row["train_loss"]
    length = math.ceil(len(losses) / _TRAIN_POINTS)
    stretches = [losses[start : start + length] for start in range(0, len(losses), length)]
    ends = [min((i + 1) * length, len(losses)) for i in range(len(stretches))]
    return ends, [statistics.fmean(stretch) for stretch in stretches]


def _rates(summary: Summary, metric: str, scale: float) -> Lines:
    """The metric by learning rate; of several settings with one rate the best, diverged ones left out."""
    sign = 1 if summary.plan.task.higher_is_better else -1
    drawn = styles(summary)
    series = []
    for label in summary.plan.labels:
        tried = [o for o in summary.outcomes if o.setting.label == label and "lr" in o.setting.grid and o.dev]
        by_rate: dict[float, Outcome] = {}
        for outcome in sorted(tried, key=lambda o: sign * o.dev.mean):
            by_rate[outcome.setting.options["lr"]] = outcome
        rates = sorted(by_rate)
        values = [[scale * row["evaluations"][-1][summary.plan.task.metric] for row in by_rate[r].rows] for r in rates]
        if len(rates) > 1:
            series.append(_band(label, drawn[label], rates, values))
    return Lines("learning_rates", f"{metric} by learning rate", "learning rate", metric, series, log_x=True)
