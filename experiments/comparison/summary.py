"""From rows to the numbers of the table: means and spreads over seeds, and the best setting of each optimizer."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.comparison.plan import Plan, Setting

__all__ = ["Stat", "Outcome", "Summary", "stat", "summarise"]


@dataclasses.dataclass(frozen=True)
class Stat:
    """A mean over seeds, and the sample standard deviation: 0 of 0 degrees of freedom is None, not 0."""

    mean: float
    spread: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a setting, over the seeds; ``dev`` and ``test`` are of the task's metric, None where a run diverged.

    Attributes:
        at_edge: options whose value, chosen from several, is the smallest or largest tried.
    """

    setting: Setting
    rows: tuple[dict[str, Any], ...]
    dev: Stat | None
    test: Stat | None
    test_loss: Stat | None
    at_edge: tuple[str, ...] = ()

    @property
    def diverged(self) -> int:
        """How many seeds."""
        return sum(row["diverged_at"] is not None for row in self.rows)

    def median(self, name: str) -> float | None:
        """Of a measured quantity over the seeds, None where it was not measured."""
        values = [row[name] for row in self.rows if row[name] is not None]
        return statistics.median(values) if values else None


@dataclasses.dataclass(frozen=True)
class Summary:
    """A comparison over those seeds for which every run is done.

    Attributes:
        seeds: those.
        outcomes: of all settings, in the order of the YAML.
        best: for each optimizer's label its best setting on "dev".
    """

    plan: Plan
    seeds: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    best: Mapping[str, Outcome]

    @property
    def jobs(self) -> int:
        """How many runs shared the device, at most: with others beside it a run's seconds are not its own."""
        return max((row.get("jobs", 1) for outcome in self.outcomes for row in outcome.rows), default=1)


def stat(values: Sequence[float]) -> Stat:
    return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def summarise(plan: Plan, rows: Mapping[str, dict[str, Any]]) -> Summary:
    """Settings are chosen on "dev", by the mean over seeds of the last evaluation; "test" has no say.

    Only seeds that are done for every setting count: a mean over other seeds would be of other runs.
    """
    seeds = tuple(seed for seed in plan.seeds if all(run.key in rows for run in plan.runs if run.seed == seed))
    if not seeds:
        return Summary(plan, (), (), {})
    outcomes = tuple(
        _outcome(plan, setting, [rows[plan.run(setting, seed).key] for seed in seeds]) for setting in plan.settings
    )
    best = {label: _best(plan, [o for o in outcomes if o.setting.label == label]) for label in plan.labels}
    return Summary(plan, seeds, outcomes, best)


def _outcome(plan: Plan, setting: Setting, rows: Sequence[dict[str, Any]]) -> Outcome:
    if any(row["diverged_at"] is not None for row in rows):
        return Outcome(setting, tuple(rows), None, None, None)
    metric = plan.task.metric
    return Outcome(
        setting,
        tuple(rows),
        dev=stat([row["evaluations"][-1][metric] for row in rows]),
        test=stat([row["test"][metric] for row in rows]),
        test_loss=stat([row["test"]["loss"] for row in rows]),
    )


def _best(plan: Plan, outcomes: Sequence[Outcome]) -> Outcome:
    """A setting that has diverged for any seed comes after all that have not; of equals the first."""
    sign = 1 if plan.task.higher_is_better else -1
    best = max(outcomes, key=lambda o: (o.dev is not None, sign * o.dev.mean if o.dev else 0.0))
    return dataclasses.replace(best, at_edge=_at_edge(best.setting, [o.setting for o in outcomes]))


def _at_edge(chosen: Setting, tried: Sequence[Setting]) -> tuple[str, ...]:
    edges = []
    for name in chosen.grid:
        values = [setting.options[name] for setting in tried]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if numeric and len(values) > 1 and chosen.options[name] in (min(values), max(values)):
            edges.append(name)
    return tuple(edges)
