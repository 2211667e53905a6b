"""The best rate of each optimizer of a comparison, and how far it lies from the first one's."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from experiments.comparison.plan import Plan

__all__ = ["BestRate", "best_rates", "vertex"]


@dataclasses.dataclass(frozen=True)
class BestRate:
    """Of one optimizer.

    Attributes:
        label: its name in the YAML.
        lr: where the parabola through the best rate tried and its two neighbours has its end, the axis being log lr;
            the best rate tried where that is the grid's first or last.
        dev: the best mean on "dev" over the seeds.
        at_edge: "<" where the best is the lowest tried, so lr is at most that; ">" where it is the highest; else "".
        cost: how much worse it is on "dev" at the control's best rate tried than at its own, relative; None where it
            was not tried there.
    """

    label: str
    lr: float
    dev: float
    at_edge: str
    cost: float | None


def best_rates(plan: Plan, rows: Mapping[str, dict]) -> list[BestRate]:
    """Of every optimizer of which ``lr`` alone has several values, the control first: that is the YAML's first.

    An optimizer is looked at once all of its runs are there, for whatever seeds. Runs that have diverged are left out.
    """
    curves = {label: _curve(plan, rows, label) for label in plan.labels}
    sign = -1 if plan.task.higher_is_better else 1
    control: float | None = None
    found = []
    for label, curve in curves.items():
        if not curve:
            continue
        rates = sorted(curve)
        best = min(rates, key=lambda lr: sign * curve[lr])
        control = best if control is None else control
        inside = best not in (rates[0], rates[-1])
        near = rates[rates.index(best) - 1 :][:3] if inside else []
        lr = vertex(near, [sign * curve[rate] for rate in near]) if inside else best
        edge = "" if inside else "<" if best == rates[0] else ">"
        cost = sign * (curve[control] / curve[best] - 1) if control in curve else None
        found.append(BestRate(label, lr, curve[best], edge, cost))
    return found


def _curve(plan: Plan, rows: Mapping[str, dict], label: str) -> dict[float, float]:
    """The mean on "dev" over the seeds that are there, by lr; empty where that is not all there is to tell."""
    runs = [run for run in plan.runs if run.setting.label == label]
    seeds = [seed for seed in plan.seeds if all(run.key in rows for run in runs if run.seed == seed)]
    if not seeds or any(set(run.setting.grid) != {"lr"} for run in runs):
        return {}
    last: dict[float, list[float]] = {}
    for run in runs:
        if run.seed in seeds:
            row = rows[run.key]
            value = row["evaluations"][-1][plan.task.metric] if row["diverged_at"] is None else math.nan
            last.setdefault(run.setting.options["lr"], []).append(value)
    means = {lr: statistics.fmean(values) for lr, values in last.items()}
    return {lr: mean for lr, mean in means.items() if math.isfinite(mean)}


def vertex(rates: Sequence[float], values: Sequence[float]) -> float:
    """Where the parabola through three points (log lr, value) has its minimum; the middle value is the lowest."""
    (x0, x1, x2), (y0, y1, y2) = map(math.log, rates), values
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if left == right:
        return rates[1]
    slope = (right - left) / (x2 - x0)
    return math.exp((x0 + x1) / 2 - left / (2 * slope))
