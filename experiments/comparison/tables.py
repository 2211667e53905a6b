"""The tables and notes of a comparison as text."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ds_mofa.profiler.report.document import Table
from ds_mofa.profiler.report.units import unit_of
from experiments.comparison.plan import Plan
from experiments.comparison.rates import BestRate
from experiments.comparison.results import differing_environments
from experiments.comparison.summary import Outcome, Stat, Summary

__all__ = ["all_table", "best_table", "fixed_table", "notes", "rates_table", "shown_metric"]


def best_table(summary: Summary) -> Table:
    """A row for each optimizer, at the setting chosen on "dev"."""
    task = summary.plan.task
    on_gpu = all(outcome.median("peak_allocated") is not None for outcome in summary.outcomes)
    peak, state = ("peak_allocated" if on_gpu else "peak_resident"), "state_bytes"
    peaks, states = (unit_of(o.median(name) for o in summary.best.values()) for name in (peak, state))
    columns: dict[str, Callable[[Outcome], str]] = {
        f"dev {task.metric}": lambda o: shown_metric(summary.plan, o.dev),
        f"test {task.metric}": lambda o: shown_metric(summary.plan, o.test),
        **({"test loss": lambda o: _shown(o.test_loss)} if task.metric != "loss" else {}),
        f"{task.unit}/s" + ", shared" * (summary.jobs > 1): lambda o: _number(o.median("units_per_second"), "{:,.0f}"),
        f"{peak.replace('_', ' ')}, {peaks.name}": lambda o: peaks.number(o.median(peak)),
        f"state, {states.name}": lambda o: states.number(o.median(state)),
        "trained": lambda o: f"{o.median('trained_parameters') / 1e6:.2f} M",
        "best of its grid": lambda o: _grid(o) + (" *" if o.at_edge else ""),
    }
    rows = [[label, *(cell(outcome) for cell in columns.values())] for label, outcome in summary.best.items()]
    return Table(["optimizer", *columns], rows)


def all_table(summary: Summary) -> Table:
    """A row for each setting. Without "test", which must not choose."""
    metric = summary.plan.task.metric
    rows = [
        [str(o.setting), shown_metric(summary.plan, o.dev), f"{o.diverged} of {len(o.rows)}" if o.diverged else "-"]
        for o in summary.outcomes
    ]
    return Table(["setting", f"dev {metric}", "diverged for seeds"], rows)


def rates_table(plan: Plan, rates: Sequence[BestRate]) -> Table:
    """A row for each optimizer whose grid is of rates; the first is the control."""
    control = rates[0]
    header = [
        "optimizer",
        "best lr",
        f"over {control.label}'s",
        f"dev {plan.task.metric}",
        f"worse at {control.label}'s best",
    ]
    rows = [
        [
            rate.label,
            f"{rate.at_edge}{rate.lr:.2g}",
            f"{rate.at_edge}{rate.lr / control.lr:.2f}",
            shown_metric(plan, Stat(rate.dev, None, 1)),
            "-" if rate.cost is None else f"{rate.cost:.1%}",
        ]
        for rate in rates
    ]
    return Table(header, rows)


def fixed_table(summary: Summary) -> Table:
    """What was the same for all."""
    plan = summary.plan
    task = dataclasses.asdict(plan.task)
    task.pop("data_dir", None)  # its content is in the key of every run
    rows = [["task", plan.task.name], *([name, _value(value)] for name, value in task.items() if value is not None)]
    rows += [[name.replace("_", " "), _value(value)] for name, value in dataclasses.asdict(plan.training).items()]
    rows.append(["seeds", ", ".join(map(str, summary.seeds))])
    environment = summary.outcomes[0].rows[0]["environment"] if summary.outcomes else {}
    rows.append(["runs at once", str(summary.jobs) if summary.jobs == 1 else f"up to {summary.jobs}"])
    rows += [[name, value] for name, value in environment.items()]
    return Table(["held fixed", ""], rows)


def notes(summary: Summary) -> list[str]:
    """What a reader must know before believing the table."""
    plan, said = summary.plan, []
    if len(summary.seeds) < len(plan.seeds):
        said.append(
            f"Not finished: {len(summary.seeds)} of {len(plan.seeds)} seeds are done for every setting, and only those "
            "are shown. The same command goes on."
        )
    for label, outcome in summary.best.items():
        for option in outcome.at_edge:
            said.append(
                f"* {label}: the best {option}, {outcome.setting.options[option]:g}, is the smallest or largest tried, "
                "so a better one may lie outside the grid."
            )
        if outcome.dev is None:
            said.append(f"{label}: every setting has diverged for at least one seed. Try lower learning rates.")
    rows = [row for outcome in summary.outcomes for row in outcome.rows]
    for name, values in differing_environments(rows).items():
        said.append(f"Not all runs were made by the same {name} ({'; '.join(values)}): give another --output_dir.")
    if summary.jobs > 1:
        said.append(
            f"Up to {summary.jobs} runs shared the device: their seconds and {plan.task.unit}/s are not their own. "
            "Losses and memory are."
        )
    if len(summary.seeds) == 1:
        said.append("One seed: differences may be chance.")
    return said


def shown_metric(plan: Plan, stat: Stat | None) -> str:
    return _shown(stat, 100 if plan.task.percent else 1, 2 if plan.task.percent else 4, plan.task.percent)


def _shown(stat: Stat | None, scale: float = 1, digits: int = 4, percent: bool = False) -> str:
    if stat is None:
        return "diverged"
    text = f"{scale * stat.mean:.{digits}f}"
    if stat.spread is not None:
        text += f" ± {scale * stat.spread:.{digits}f}"
    return text + (" %" if percent else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _grid(outcome: Outcome) -> str:
    setting = outcome.setting
    return ", ".join(f"{name} {_value(setting.options[name])}" for name in setting.grid) or "-"


def _value(value: object) -> str:
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name  # the folders above it are of one machine
    return f"{value:g}" if isinstance(value, float) else str(value)
