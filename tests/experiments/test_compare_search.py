"""The search for a rate: grids grow until the best is not at an end, and all seeds are trained at it."""

import math

import pytest

from experiments.comparison import published
from experiments.comparison.search import at_the_best, check_searchable, widened
from launch.errors import UserError
from tests.experiments.comparisons import language_plan

RATES = [1e-4, 2e-4, 4e-4]


def searched(tmp_path, best_lr: float, diverges_from: float = math.inf):
    """The plan that is reached where the loss is a parabola in log lr, with the rows of all that was tried."""
    given = language_plan(tmp_path, optimizers={"AdamW": {"lr": RATES}}, seeds=[3, 4])
    plan = given.with_settings(given.settings, given.seeds[:1])
    rows: dict = {}
    while True:
        for run in plan.runs:
            lr = run.setting.options["lr"]
            loss = math.log(lr / best_lr) ** 2
            known = {
                "key": run.key,
                "seed": run.seed,
                "optimizer": run.setting.optimizer,
                "options": run.setting.options,
            }
            rows[run.key] = {
                **known,
                "diverged_at": 1 if lr >= diverges_from else None,
                "evaluations": [{"loss": loss}],
            }
        wider = widened(plan, rows, given)
        if len(wider.settings) == len(plan.settings):
            return plan, rows, given
        plan = wider


def rates(plan) -> list[float]:
    return [setting.options["lr"] for setting in plan.settings]


@pytest.mark.parametrize(
    "best_lr, tried",
    [
        (2.1e-4, RATES),
        (1.1e-4, [5e-5, *RATES]),
        (3.0e-5, [1.25e-5, 2.5e-5, 5e-5, *RATES]),
        (1.5e-3, [*RATES, 8e-4, 1.6e-3, 3.2e-3]),
        (1e-9, [6.25e-6, 1.25e-5, 2.5e-5, 5e-5, *RATES]),  # four more, and no end to it
    ],
)
def test_a_grid_grows_until_its_best_is_inside(tmp_path, best_lr, tried):
    plan, rows, given = searched(tmp_path, best_lr)
    assert rates(plan) == tried
    best = at_the_best(plan, rows, given.seeds)
    nearest = min(tried, key=lambda lr: abs(math.log(lr / best_lr)))
    assert rates(best) == [nearest] and [run.seed for run in best.runs] == [3, 4]


def test_the_rows_alone_tell_what_was_searched(tmp_path):
    """Without the data the keys are others; the grid is found again by what its runs were."""
    plan, rows, given = searched(tmp_path, 3.0e-5)
    grid, found = published.searched(given, {f"other {key}": row for key, row in rows.items()})
    assert rates(grid) == rates(plan) == [1.25e-5, 2.5e-5, 5e-5, *RATES]
    assert {row["options"]["lr"] for row in found.values()} == set(rates(plan))


def test_what_has_diverged_is_not_the_best(tmp_path):
    plan, rows, given = searched(tmp_path, best_lr=1e-3, diverges_from=8e-4)
    assert rates(plan) == [*RATES, 8e-4], "the one beyond tells that the best is inside"
    assert rates(at_the_best(plan, rows, given.seeds)) == [4e-4]


@pytest.mark.parametrize("options", [{"lr": 1e-3}, {"lr": [1e-3, 2e-3]}, {"lr": RATES, "rank": [2, 4]}])
def test_what_cannot_be_searched_is_refused(tmp_path, options):
    plan = language_plan(tmp_path, optimizers={"MoFaSGD": {"rank": 4, **options}})
    with pytest.raises(UserError, match="needs three rates or more"):
        check_searchable(plan)
