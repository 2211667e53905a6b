#!/usr/bin/env python
"""The figures of docs/learning, from the results of comparisons that have looked for their rates.

    python experiments/settings_figures.py --output_dir docs/learning

Draws best_rates.png: the best rate of each setting over AdamW's, and losses.png: the loss of each at its best rate, beside
AdamW's; a line for each task. Prints what they show.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

# A script's first import folder is its own; this makes it the repository's, from wherever it is run.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_mofa.profiler.report.charts import Lines, Series
from ds_mofa.profiler.report.drawing import draw, save_png
from ds_mofa.profiler.report.styles import HIGHLIGHTED
from experiments.comparison.plan import Plan, load_plan
from experiments.comparison.published import matched, searched
from experiments.comparison.rates import best_rates
from experiments.comparison.results import Results
from experiments.comparison.search import at_the_best
from experiments.comparison.summary import summarise

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PLANS = ROOT / "experiments/results", ROOT / "experiments/configs/comparisons"
# Task, its folder of results, its YAML.
TASKS = {
    "code": ("finetune_code", "finetune_answers"),
    "questions": ("finetune_questions", "finetune_answers"),
    "text": ("finetune_text", "finetune_text"),
    "sentiment (SST-2)": ("sst2_why", "sst2_why"),
    "from random weights": ("pretrain_rank8", "pretrain_rank8"),
}
_EXPLORED = ["r=8 explore 8", "r=8 explore 32", "r=8 explore 56", "r=32 explore 32", "r=32 explore 128"]
RATES = ["r=4", "r=8", "r=16", "r=32", "r=4 explore 16", *_EXPLORED]
LOSSES = [
    "LoRA r=8",
    "LoRA r=32",
    "GaLore r=32",
    "AdamW bf16",
    "r=8",
    "r=16",
    "r=32",
    *(s for s in _EXPLORED if "56" not in s),
]


def read(folder: str, yaml: str) -> tuple[Plan, Plan, Mapping[str, dict]]:
    """The grid of the first seed as far as it was widened, all seeds at the best of it, and the rows of both."""
    # The data are not read: rows are known by their optimizer, options and seed.
    given = load_plan(
        PLANS / f"{yaml}.yaml", Path("data"), pretrained="model" if "finetune" in yaml else None, identify=False
    )
    with Results(RESULTS / folder / "results.jsonl") as results:
        rows = results.rows
    plan, found = matched(given, rows)
    if len(found) == len(given.runs):  # nothing was searched: the whole grid has all seeds
        return plan, plan, found
    grid, found = searched(given, rows)
    best, more = matched(at_the_best(grid, found, given.seeds), rows)
    return grid, best, {**found, **more}


def lines(name: str, title: str, y_label: str, settings: list[str], values: Mapping[str, Mapping[str, float]]) -> Lines:
    """One line a task over the settings that it has."""
    series = []
    for style, (task, own) in zip(HIGHLIGHTED, values.items()):
        x = [float(i) for i, setting in enumerate(settings) if setting in own]
        y = [own[setting] for setting in settings if setting in own]
        series.append(Series(task, style, x, y, y, y))
    ticks = [
        setting.replace(" explore ", "\nexplore ").replace(" bf16", "\nbf16").replace(" r=", "\nr=")
        for setting in settings
    ]
    return Lines(name, title, "", y_label, series, ticks=ticks)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs/learning")
    args = parser.parse_args(argv)
    rates: dict[str, dict[str, float]] = {}
    losses: dict[str, dict[str, float]] = {}
    for task, (folder, yaml) in TASKS.items():
        grid, best, rows = read(folder, yaml)
        found = {rate.label: rate for rate in best_rates(grid, rows)}
        rates[task] = {label: rate.lr / found["AdamW"].lr for label, rate in found.items() if label in RATES}
        print(task, {label: f"{ratio:.2f}{found[label].at_edge}" for label, ratio in rates[task].items()})
        if folder.startswith("finetune"):
            ends = {label: outcome.test.mean for label, outcome in summarise(best, rows).best.items() if outcome.test}
            losses[task] = {label: 100 * (ends[label] / ends["AdamW"] - 1) for label in ends if label in LOSSES}
            print(task, {label: f"{worse:+.1f} %" for label, worse in losses[task].items()})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for chart in (
        lines("best_rates", "best learning rate over AdamW's", "times AdamW's best rate", RATES, rates),
        lines(
            "losses",
            "loss on held-out text over AdamW's with fp32 masters, three seeds",
            "% above AdamW",
            LOSSES,
            losses,
        ),
    ):
        print(save_png(draw(chart), args.output_dir / f"{chart.name}.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
