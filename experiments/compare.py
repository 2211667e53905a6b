#!/usr/bin/env python
"""Compare optimizers: the same weights, the same batches in the same order, a grid for each, several seeds.

    python experiments/compare.py experiments/configs/comparisons/sst2.yaml --data_dir path/to/sst2

Prints a table and writes, into --output_dir (out/comparisons/sst2), report.html, summary.md, summary.json, a PNG for
each chart, and results.jsonl with every run. Interrupted, the same command goes on: a run that is in results.jsonl is
not made again; with ``--only_report`` the report of a results.jsonl is written anew, and nothing is trained. With
``--find_rates`` the first seed finds the best rate of each optimizer, its grid growing until that is not at an end, and
the others are trained at it; rates/ has the grids.
docs/comparing.md says what is held fixed, and how to add a task or an optimizer.
"""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# A script's first import folder is its own; this makes it the repository's, from wherever it is run.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from experiments.comparison.isolation import in_own_process, in_own_processes
from experiments.comparison.plan import Plan, Run, load_plan
from experiments.comparison.published import matched, searched
from experiments.comparison.reading import unknown
from experiments.comparison.report import write_report
from experiments.comparison.results import Results
from experiments.comparison.search import at_the_best, check_searchable, widened
from experiments.comparison.training import check_settings, kept_key, train_and_keep
from launch.errors import UserError


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    # As an exception it ends the process of the run as well.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU. Leave the option out to train on the CPU.")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1.")
    chosen = (args.plan, args.data_dir, args.optimizers, args.seeds, args.pretrained)
    plan = load_plan(*chosen, identify=not args.only_report)
    folder = args.output_dir or Path("out/comparisons") / plan.name
    if args.only_report:
        print(report_only(plan, folder, args.find_rates))
        return
    keep = models_to_keep(plan, args.keep_models or (), folder)
    with Results(folder / "results.jsonl") as results:
        if args.find_rates:
            plan = find_rates(plan, results, folder, args.device, args.jobs)
            keep = models_to_keep(plan, args.keep_models or (), folder)
        run_all(plan, results, folder, args.device, args.jobs, keep)
        table = write_report(plan, results.rows, folder)
    print(f"\n{table}\nreport: {folder / 'report.html'}, and summary.md beside it")
    if keep:
        print("models: " + ", ".join(str(model) for key, model in keep.items() if kept_key(model) == key))


def report_only(plan: Plan, folder: Path, found_rates: bool) -> str | None:
    """Write the report of the runs that ``folder`` holds; returns the table."""
    if not (folder / "results.jsonl").is_file():
        raise UserError(f"--only_report: {folder} has no results.jsonl. Give the folder of a comparison.")
    with Results(folder / "results.jsonl") as results:
        if found_rates:
            plan = report_rates(plan, results, folder)
        return write_report(*matched(plan, results.rows), folder)


def report_rates(given: Plan, results: Results, folder: Path) -> Plan:
    """What :func:`find_rates` has found; without the data."""
    grid, rows = searched(given, results.rows)
    write_report(grid, rows, folder / "rates", curves=False)
    return at_the_best(grid, rows, given.seeds)


def find_rates(given: Plan, results: Results, folder: Path, device: str, jobs: int) -> Plan:
    """Train the first seed until every best rate lies between others; the plan of all seeds at those."""
    check_searchable(given)
    plan = given.with_settings(given.settings, given.seeds[:1])
    while True:
        run_all(plan, results, folder / "rates", device, jobs, {})
        write_report(plan, results.rows, folder / "rates", curves=False)
        wider = widened(plan, results.rows, given)
        if len(wider.settings) == len(plan.settings):
            return at_the_best(plan, results.rows, given.seeds)
        plan = wider


def models_to_keep(plan: Plan, labels: Sequence[str], folder: Path) -> dict[str, Path]:
    """Where the models of these optimizers go, by the key of the run."""
    for label in labels:
        if label not in plan.labels:
            raise UserError(unknown(label, plan.labels, "--keep_models: the YAML has no"))
    return {run.key: folder / "models" / run.file_name for run in plan.runs if run.setting.label in labels}


def run_all(plan: Plan, results: Results, folder: Path, device: str, jobs: int, keep: Mapping[str, Path]) -> None:
    """Make, ``jobs`` at a time, the runs that are not in ``results``, or whose model is to be kept and is not there."""
    waiting = [run for run in plan.runs if not done(run, results, keep.get(run.key))]
    jobs = max(1, min(jobs, len(waiting)))
    at_a_time = f", {jobs} at a time" if jobs > 1 else ""
    print(f"{plan.name}: {len(plan.runs)} runs, {len(plan.runs) - len(waiting)} of them done, on {device}{at_a_time}")
    sys.stdout.flush()
    if not waiting:
        return
    plan.task.prepare()
    settings = [setting for setting in plan.settings if any(run.setting is setting for run in waiting)]
    in_own_process(check_settings, settings, plan.training, plan.task, device=device)
    left = {seed: sum(run.seed == seed for run in waiting) for seed in plan.seeds}
    started = time.monotonic()
    calls = [(run, plan.task, keep.get(run.key)) for run in waiting]
    with contextlib.closing(in_own_processes(train_and_keep, calls, device=device, jobs=jobs)) as ended:
        for number, (index, row) in enumerate(ended, start=1):
            run = waiting[index]
            setting = {"label": run.setting.label, "optimizer": run.setting.optimizer, "options": run.setting.options}
            results.append({"key": run.key, **setting, "seed": run.seed, "jobs": jobs, **row})
            minutes = (time.monotonic() - started) / number * (len(waiting) - number) / 60
            print(f"[{number}/{len(waiting)}] {run}: {outcome(plan, row)}; about {minutes:.0f} min left", flush=True)
            left[run.seed] -= 1
            if left[run.seed] == 0 and number < len(waiting):
                write_report(plan, results.rows, folder)


def done(run: Run, results: Results, model: Path | None) -> bool:
    row = results.rows.get(run.key)
    return row is not None and (model is None or row["diverged_at"] is not None or kept_key(model) == run.key)


def outcome(plan: Plan, row: dict) -> str:
    if row["diverged_at"] is not None:
        return f"diverged at step {row['diverged_at']}"
    metric, last = plan.task.metric, row["evaluations"][-1]
    return f"dev {metric} {last[metric]:.4f} after {last['seconds']:.0f} s of training"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML of the comparison; see experiments/configs/comparisons")
    parser.add_argument("--data_dir", type=Path, help="folder of the data; overrides the YAML's")
    parser.add_argument("--output_dir", type=Path, help="default: out/comparisons/NAME, by the YAML's file name")
    parser.add_argument("--pretrained", help="model to start from, a folder or Hub name; overrides the YAML's")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="only these of the YAML's")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these of the YAML's")
    parser.add_argument(
        "--keep_models", nargs="+", metavar="NAME", help="keep what these optimizers trained, in OUTPUT_DIR/models"
    )
    parser.add_argument("--only_report", action="store_true", help="train nothing: report on OUTPUT_DIR/results.jsonl")
    parser.add_argument("--find_rates", action="store_true", help="look for the best rate, then train all seeds at it")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once, spread over the GPUs; default: 1"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        sys.exit(2)
