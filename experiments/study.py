#!/usr/bin/env python
"""Look at the gradients and the momentum of a training: what a projection loses, how low-rank the momentum is, how large
AdamW's update is.

    pip install -e ".[compare]"
    python experiments/study.py projection --data_dir sst2=path/to/sst2
    python experiments/study.py spectrum --data_dir sst2=path/to/sst2
    python experiments/study.py updates --data_dir sst2=path/to/sst2

Each writes NAME.md, NAME.json and figures into --output_dir; experiments/results has what they have written. A PLAN is
a YAML as experiments/compare.py takes it (docs/comparing.md); the first of its optimizers trains, and is looked at.
`spectrum` goes on to train by the others, which have a rank or are of full rank, and relates their losses to the
energy a rank holds. `python experiments/study.py page experiments/results/spectrum.json` writes page and figures anew
from the numbers.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

# A script's first import folder is its own; this makes it the repository's, from wherever it is run.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch

from experiments.comparison.plan import Plan, load_plan
from experiments.studies import projection, spectrum, updates
from experiments.studies.pages import described, write_pages, write_study
from experiments.studies.synthetic import SEQUENCES, SHAPE
from experiments.studies.trajectory import Trajectory
from launch.errors import UserError

STARTED = time.monotonic()


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    if args.study == "page":
        written = write_pages(json.loads(args.json.read_text(encoding="utf-8")), args.json.parent)
    else:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU. Leave the option out to run on the CPU.")
        plans = read_plans(args)
        measure = {"projection": measure_projection, "spectrum": measure_spectrum, "updates": measure_updates}[
            args.study
        ]
        result = {**described(args.study, argv, plans, torch.device(args.device)), **measure(args, plans)}
        result["seconds"] = round(time.monotonic() - STARTED)
        written = write_study(result, args.output_dir)
    print("wrote " + ", ".join(map(str, written)))


def measure_projection(args: argparse.Namespace, plans: list[Plan]) -> dict:
    device = torch.device(args.device)
    trajectories = {plan.name: Trajectory(plan.runs[0], plan.task, device) for plan in plans}
    smallest = {name: min(min(p.shape) for p in t.matrices.values()) for name, t in trajectories.items()}
    for name, side in {**smallest, "a made-up sequence": min(SHAPE)}.items():
        if max(args.ranks) > side:
            raise UserError(f"--ranks: {max(args.ranks)} is more than {name} has: its smallest matrix side is {side}.")
    measured = {}
    for name, made_up in SEQUENCES.items():
        say(name)
        measured[name] = projection.measure(made_up(args.synthetic_steps, device), args.ranks, args.beta, args.every)
    for name, trajectory in trajectories.items():
        say(name)
        measured[name] = projection.measure(trajectory, args.ranks, args.beta, args.every)
    options = {"ranks": args.ranks, "beta": args.beta, "every": args.every, "synthetic_steps": args.synthetic_steps}
    return {"options": options, "sequences": measured}


def measure_spectrum(args: argparse.Namespace, plans: list[Plan]) -> dict:
    observed, costs = {}, {}
    for plan in plans:
        say(f"{plan.name}: the trainer")
        others = [s.options for s in plan.settings if s.label != plan.labels[0]]
        tops = sorted({*args.tops, *(options["rank"] for options in others if "rank" in options)})
        betas = sorted({*args.betas, *(options.get("beta", 0.85) for options in others if "rank" in options)})
        trajectory = Trajectory(plan.runs[0], plan.task, torch.device(args.device))
        observed[plan.name] = spectrum.observe(trajectory, betas, tops, args.every)
        if others:
            costs[plan.name] = spectrum.costs(plan, args.device, observed[plan.name], say)
    return {"options": {"tops": args.tops, "betas": args.betas, "every": args.every}, "tasks": observed, "costs": costs}


def measure_updates(args: argparse.Namespace, plans: list[Plan]) -> dict:
    measured = {}
    for plan in plans:
        say(plan.name)
        trajectory = Trajectory(plan.runs[0], plan.task, torch.device(args.device))
        measured[plan.name] = updates.measure(trajectory, args.tops, args.every)
    return {"options": {"tops": args.tops, "every": args.every}, "tasks": measured}


def read_plans(args: argparse.Namespace) -> list[Plan]:
    """The YAMLs, each with its data folder and, where ``--steps`` is given, of another length."""
    folders = dict(args.data_dir)
    unknown = sorted(folders.keys() - {path.stem for path in args.plans})
    if unknown:
        raise UserError(f"--data_dir: no PLAN is called {unknown[0]!r}. Give NAME=FOLDER with the name of a YAML.")
    plans = [load_plan(path, folders.get(path.stem)) for path in args.plans]
    if args.steps is not None:
        plans = [dataclasses.replace(plan, **shortened(plan, args.steps)) for plan in plans]
    shortest = min([plan.training.steps for plan in plans] + [getattr(args, "synthetic_steps", args.every)])
    if args.every > shortest:
        raise UserError(f"--every: {args.every} is more than the {shortest} steps of a sequence. Give fewer.")
    return plans


def shortened(plan: Plan, steps: int) -> dict:
    warmup = min(plan.training.warmup_steps, steps - 1)
    training = dataclasses.replace(plan.training, steps=steps, eval_every=steps, warmup_steps=warmup)
    return {"training": training, "runs": tuple(dataclasses.replace(run, training=training) for run in plan.runs)}


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = parser.add_subparsers(dest="study", required=True)
    of_projection = studies.add_parser("projection", help="tangent, left, right and two-sided projection")
    of_projection.add_argument("--ranks", nargs="+", type=positive, default=[8, 32])
    of_projection.add_argument("--beta", type=float, default=0.85, help="decay of the momentum")
    of_projection.add_argument("--synthetic_steps", type=positive, default=250, help="of the made-up sequences")
    of_spectrum = studies.add_parser("spectrum", help="energy in the leading directions of the momentum, and its worth")
    of_spectrum.add_argument("--tops", nargs="+", type=positive, default=[8, 16, 32, 64], help="numbers of directions")
    of_spectrum.add_argument("--betas", nargs="+", type=float, default=[0.85, 0.95], help="decays of the momentum")
    of_updates = studies.add_parser("updates", help="root mean square and singular values of AdamW's update")
    of_updates.add_argument(
        "--tops", nargs="+", type=positive, default=[1, 2, 4, 8, 16, 32, 64], help="singular values"
    )
    for study, every in ((of_projection, 5), (of_spectrum, 10), (of_updates, 25)):
        plans = [ROOT / "experiments/configs/studies/lm.yaml", ROOT / "experiments/configs/studies/sst2.yaml"]
        study.add_argument(
            "plans", nargs="*", type=Path, default=plans, metavar="PLAN", help="YAMLs of experiments/configs/studies"
        )
        study.add_argument("--data_dir", nargs="*", type=folder_by_name, default=[], metavar="NAME=FOLDER")
        study.add_argument("--steps", type=positive, help="of training; overrides the YAMLs'")
        study.add_argument("--every", type=positive, default=every, help="steps between two looks at the momentum")
        study.add_argument("--output_dir", type=Path, default=ROOT / "experiments/results")
        study.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    page = studies.add_parser("page", help="write the page and the figures of a JSON anew")
    page.add_argument("json", type=Path)
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def folder_by_name(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=FOLDER, such as sst2=path/to/sst2")
    return name, Path(folder)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        sys.exit(2)
