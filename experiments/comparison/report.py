"""What a comparison leaves behind: summary.md, summary.json, report.html and a PNG for each chart."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_mofa.profiler.report.document import Document, Figure, Points, Section, Text
from ds_mofa.profiler.report.rendering import markdown_table, write
from experiments.comparison.curves import charts
from experiments.comparison.plan import Plan
from experiments.comparison.rates import best_rates
from experiments.comparison.results import check_control
from experiments.comparison.summary import Outcome, Summary, summarise
from experiments.comparison.tables import all_table, best_table, fixed_table, notes, rates_table

__all__ = ["write_report"]

_CURVES = (
    "Each optimizer at its best setting, the mean over seeds; bands reach from the lowest seed to the highest. In "
    "colour the first optimizer of the YAML and the best others, the rest in grey."
)

_RATES = (
    "On dev. A best rate lies between those tried, by a parabola through the best of them and its neighbours; < and > mark "
    "one at the end of its grid. The last column is what it costs to take the first optimizer's best rate tried."
)


def write_report(plan: Plan, rows: Mapping[str, dict[str, Any]], folder: Path, *, curves: bool = True) -> str | None:
    """Write the report of the seeds that are done.

    Args:
        curves: with the learning curves of each optimizer's best setting.

    Returns:
        The table of the best settings with its notes, as Markdown; None where not one seed is done.

    Raises:
        UserError: see :func:`experiments.comparison.results.check_control`.
    """
    check_control(plan, rows)
    summary = summarise(plan, rows)
    if not summary.seeds:
        return None
    best, said, drawn = best_table(summary), notes(summary), charts(summary, curves)
    found = best_rates(plan, rows)
    rates = [rates_table(plan, found)] if len(found) > 1 else []
    document = Document(
        f"Comparison {plan.name}",
        _subtitle(summary) + ".",
        [
            Section("", [best, *([Points(said)] if said else [])]),
            *([Section("Curves", [Text(_CURVES), *map(Figure, drawn)])] if drawn else []),
            *([Section("Best rates", [Text(_RATES), *rates])] if rates else []),
            Section("All settings", [all_table(summary)], folded=True),
            Section("What was held fixed", [fixed_table(summary)], folded=True),
        ],
    )
    write(document, folder, "summary.md")
    (folder / "summary.json").write_text(json.dumps(_as_json(summary, said), indent=1) + "\n", encoding="utf-8")
    return "\n".join([markdown_table(best), *(f"- {note}" for note in said)])


def _subtitle(summary: Summary) -> str:
    training, seeds = summary.plan.training, len(summary.seeds)
    device = summary.outcomes[0].rows[0]["environment"]["device"]
    spread = "mean ± sample standard deviation over the seeds; " if seeds > 1 else ""
    return (
        f"{device}; {training.steps} steps of {training.batch_size} examples; {seeds} seed{'s' * (seeds > 1)}; "
        f"{spread}settings chosen on dev"
    )


def _as_json(summary: Summary, said: list[str]) -> dict[str, Any]:
    """Every setting with its statistics and the keys of its rows in results.jsonl, and which was chosen."""
    return {
        "comparison": summary.plan.name,
        "task": summary.plan.identity,
        "training": dataclasses.asdict(summary.plan.training),
        "seeds": list(summary.seeds),
        "settings": [_outcome(outcome) for outcome in summary.outcomes],
        "best": {label: str(outcome.setting) for label, outcome in summary.best.items()},
        "notes": said,
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    stats = {name: getattr(outcome, name) for name in ("dev", "test", "test_loss")}
    measured = ("units_per_second", "peak_allocated", "peak_resident", "state_bytes", "trained_parameters")
    return {
        "setting": str(outcome.setting),
        "label": outcome.setting.label,
        "optimizer": outcome.setting.optimizer,
        "options": dict(outcome.setting.options),
        "diverged": outcome.diverged,
        **{name: dataclasses.asdict(stat) if stat else None for name, stat in stats.items()},
        **{name: outcome.median(name) for name in measured},
        "runs": [row["key"] for row in outcome.rows],
    }
