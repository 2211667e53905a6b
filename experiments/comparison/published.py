"""A comparison whose data are not at hand: its YAML says what was compared, its rows what came of it."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from experiments.comparison.plan import Plan
from experiments.comparison.search import widened
from launch.errors import UserError

__all__ = ["matched", "searched"]

Rows = Mapping[str, dict[str, Any]]


def matched(plan: Plan, rows: Rows) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """The part of a plan that there are rows for, and those by the keys of its runs.

    Without the data no key can be computed; a row is known by its optimizer, its options and its seed instead.

    Raises:
        UserError: not one row is of this plan.
    """
    known = {_known_by(row["optimizer"], row["options"], row["seed"]): row for row in rows.values()}
    found = {}
    for run in plan.runs:
        row = known.get(_known_by(run.setting.optimizer, run.setting.options, run.seed))
        if row is not None:
            found[run.key] = {**row, "key": run.key}
    if not found:
        raise UserError("--only_report: no row of results.jsonl is of this YAML. Give the YAML that made them.")
    runs = tuple(run for run in plan.runs if run.key in found)
    kept = tuple(setting for setting in plan.settings if any(run.setting is setting for run in runs))
    seeds = tuple(seed for seed in plan.seeds if any(run.seed == seed for run in runs))
    runs = tuple(run for run in plan.runs if run.seed in seeds and any(run.setting is setting for setting in kept))
    return dataclasses.replace(plan, settings=kept, seeds=seeds, runs=runs), found


def searched(given: Plan, rows: Rows) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """The grid of the first seed as ``--find_rates`` has widened it, and its rows.

    Raises:
        UserError: see :func:`matched`.
    """
    grid, found = matched(given.with_settings(given.settings, given.seeds[:1]), rows)
    while True:
        wider, more = matched(widened(grid, found, given), rows)
        if len(wider.settings) == len(grid.settings):
            return grid, found
        grid, found = wider, more


def _known_by(optimizer: str, options: Mapping[str, Any], seed: int) -> str:
    if optimizer == "MoFaSGD":  # what did not say in which units its rate is had those that were the default
        options = {"adjust_lr_fn": "match_rms_adamw", **options}
    return json.dumps([optimizer, options, seed], sort_keys=True)
