"""Rates tried until the best of each optimizer lies between others, then every seed at that one."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from experiments.comparison.plan import Plan, Setting
from launch.errors import UserError

__all__ = ["at_the_best", "check_searchable", "widened"]

Rows = Mapping[str, dict[str, Any]]

_WIDENINGS = 4  # of one grid: what is still best at an end after that has another fault than its rate


def check_searchable(plan: Plan) -> None:
    """That the rate, and nothing else, has several values in every grid.

    Raises:
        UserError: another option has, or the rate has one or two.
    """
    for label in plan.labels:
        settings = _of(plan, label)
        if settings[0].grid != ("lr",) or len(settings) < 3:
            raise UserError(
                f"--find_rates: {label} needs three rates or more, and one value of every other option. Give other values an "
                "entry of their own."
            )


def widened(plan: Plan, rows: Rows, given: Plan) -> Plan:
    """``plan`` with one rate more for every optimizer whose best is at an end of its grid, as far beyond it as the grid's
    last two lie apart; the same plan where there is none.

    Args:
        plan: of one seed, all of its runs in ``rows``.
        given: as the YAML had it; no grid grows by more than four rates.
    """
    settings: list[Setting] = []
    for label in plan.labels:
        grid = sorted(_of(plan, label), key=_lr)
        best = grid.index(_best(plan, rows, grid))
        if len(grid) < len(_of(given, label)) + _WIDENINGS:
            if best == 0:
                grid.insert(0, _at(grid[0], _lr(grid[0]) ** 2 / _lr(grid[1])))
            elif best == len(grid) - 1:
                grid.append(_at(grid[-1], _lr(grid[-1]) ** 2 / _lr(grid[-2])))
        settings += grid
    return plan.with_settings(settings, plan.seeds)


def at_the_best(plan: Plan, rows: Rows, seeds: tuple[int, ...]) -> Plan:
    """Every optimizer at the rate that is best in ``plan``, over all ``seeds``."""
    return plan.with_settings([_best(plan, rows, _of(plan, label)) for label in plan.labels], seeds)


def _of(plan: Plan, label: str) -> list[Setting]:
    return [setting for setting in plan.settings if setting.label == label]


def _lr(setting: Setting) -> float:
    return setting.options["lr"]


def _at(setting: Setting, lr: float) -> Setting:
    # Six digits: the same number on every machine, and in the file as a person would write it.
    return dataclasses.replace(setting, options={**setting.options, "lr": float(f"{lr:.6g}")})


def _best(plan: Plan, rows: Rows, settings: list[Setting]) -> Setting:
    """On "dev", at the first seed; one that has diverged comes last."""
    sign = -1 if plan.task.higher_is_better else 1

    def score(setting: Setting) -> float:
        row = rows[plan.run(setting, plan.seeds[0]).key]
        return math.inf if row["diverged_at"] is not None else sign * row["evaluations"][-1][plan.task.metric]

    return min(settings, key=score)
