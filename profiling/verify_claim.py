"""Does MoFaSGD fine-tune LLaMA-3.1-8B in 29 GB, where AdamW takes 70? Measured, predicted, and every GB accounted for.

    python profiling/verify_claim.py --output_dir out/claim

Trains in the paper's setting (arXiv 2507.08091: LLaMA-3.1-8B, bf16, batch 1, 1024 tokens, 8 micro-batches, no gradient
checkpointing; random weights), each run in processes of its own: on one GPU AdamW, MoFaSGD with HF's layers and loss,
MoFaSGD with liger-kernel's where that is installed, and LoRA where peft is; and where there are several GPUs, AdamW and
MoFaSGD under ZeRO-2 and ZeRO-3 on all of them. A run is written as in profiling/throughput.py:
BACKEND:OPTIMIZER[:OPTION=VALUE...].

Writes report.md, report.html, report.json and PNGs with a verdict on every claim; a folder with the report and the log
of every run; ``--reuse`` takes over the runs that a folder holds already, so that they need not come in one go. Without
a GPU (give a small --model_config) it measures the host's memory and says so.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch

from ds_mofa.profiler import load_report
from ds_mofa.profiler.categories import gb
from ds_mofa.profiler.claims import judge
from ds_mofa.profiler.predict import PredictionError, Setting, predict
from ds_mofa.profiler.report import SCHEMA_VERSION, environment, write_pages
from ds_mofa.profiler.report.masking import masked

ONE_GPU = ["torch:AdamW", "torch:MoFaSGD:r=8", "torch:MoFaSGD:r=8:liger=1", "torch:LoRA:r=8"]
SEVERAL = ["zero2:AdamW", "zero2:MoFaSGD:r=32", "zero3:AdamW", "zero3:MoFaSGD:r=32"]
# What is in a run's name: the module that such runs need, and the package it is in.
NEEDED = {":LoRA": ("peft", "peft"), ":liger=1": ("liger_kernel", "liger-kernel")}


def main() -> None:
    args = make_parser().parse_args()
    out, model_config = Path(args.output_dir).resolve(), Path(args.model_config).resolve()
    os.chdir(ROOT)  # so that reports name files as everybody has them
    args.model_config = os.path.relpath(model_config) if model_config.is_relative_to(ROOT) else str(model_config)
    out.mkdir(parents=True, exist_ok=True)
    gpus = args.gpus if args.gpus is not None else max(1, torch.cuda.device_count())
    for run in args.runs or ():
        check_run(run)
    wanted = args.runs or [*ONE_GPU, *(SEVERAL if gpus > 1 else [])]
    there = [run for run in wanted if args.reuse and (folder_of(run, out) / "report.json").exists()]
    chosen, notes = can_run(wanted, there)
    if not args.runs and gpus == 1:
        notes.append("ZeRO-2 and ZeRO-3 on several GPUs were not run: this machine has one device.")

    runs = {}
    for run in chosen:
        ranks = 1 if run.startswith("torch:") else gpus
        runs[run] = one_run(run, ranks, args, out)
        print(one_line(run, runs[run]), flush=True)
    claims = judge(runs)
    document = {
        "schema_version": SCHEMA_VERSION,
        "kind": "claim",
        "created": max((r["created"] for r in runs.values() if "created" in r), default=None),
        "command": ["python", "profiling/verify_claim.py", *masked(sys.argv[1:])],
        "environment": next((r["environment"] for r in runs.values() if "environment" in r), environment()),
        "claims": claims,
        "runs": runs,
        "notes": notes,
    }
    title = f"Memory of AdamW and MoFaSGD: {Path(args.model_config).stem}, {args.shape}"
    files = write_pages(runs, out, document, claims, title)
    print()
    for claim in claims:
        print(f"{claim['verdict']:>28}  {claim['claim']}: {claim['measured']}")
    print(f"\nreport: {', '.join(str(path) for path in files[:3])}")
    failed = [run for run, report in runs.items() if "error" in report]
    if failed:
        sys.exit(f"verify_claim.py: error: {len(failed)} runs failed ({', '.join(failed)}); see their logs in {out}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default=str(ROOT / "configs/models/llama-3.1-8b.json"))
    parser.add_argument("--shape", default="1024x8", metavar="TOKENSxMICRO_BATCHES")
    parser.add_argument("--runs", nargs="+", metavar="BACKEND:OPTIMIZER[:OPTION=VALUE...]")
    parser.add_argument("--gpus", type=int, help="ranks of the ZeRO runs; default: all devices")
    parser.add_argument("--steps", type=int, default=6, help="steps timed with the profiler, and as many without")
    parser.add_argument("--sample_hz", type=float, default=50.0)
    parser.add_argument("--timeout", type=int, default=400, help="seconds for one run")
    parser.add_argument("--memory_snapshot", action="store_true", help="keep each run's history for memory_viz")
    parser.add_argument("--reuse", action="store_true", help="do not repeat runs whose report is in the folder")
    parser.add_argument("--output_dir", default="out/claim")
    return parser


def check_run(run: str) -> None:
    """Exit with what is wrong with a run's name, before any of them has taken its minutes."""
    backend, optimizer, *options = run.split(":") if ":" in run else (run, "")
    known = ["AdamW", "MoFaSGD", "LoRA"] if backend == "torch" else ["AdamW", "MoFaSGD"]
    if backend not in ("torch", "zero0", "zero1", "zero2", "zero3") or optimizer not in known:
        sys.exit(
            f"verify_claim.py: error: {run!r} cannot be run: give torch:{{AdamW,MoFaSGD,LoRA}} or zero0 to "
            "zero3:{AdamW,MoFaSGD}, and options such as r=8 after it"
        )
    if any("=" not in option for option in options):
        sys.exit(f"verify_claim.py: error: {run!r}: an option is written NAME=VALUE, such as r=8")


def can_run(runs: list[str], there: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Those that this machine has the packages for, or that are ``there``, and a note on each other."""
    chosen, notes = [], []
    for run in runs:
        needed = [names for part, names in NEEDED.items() if part in run]
        missing = [package for module, package in needed if importlib.util.find_spec(module) is None]
        if run in there:
            chosen.append(run)
        elif missing:
            notes.append(f"{run} was not run: {missing[0]} is not installed (pip install {missing[0]}).")
        elif ":liger=1" in run and not torch.cuda.is_available():
            notes.append(f"{run} was not run: liger-kernel's kernels need a GPU.")
        else:
            chosen.append(run)
    return chosen, notes


def folder_of(run: str, out: Path) -> Path:
    """Where a run's report and log are."""
    return out / run.replace(":", "_").replace("=", "")


def one_run(run: str, ranks: int, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run in processes of its own; the report, or ``{"error": why there is none}``."""
    folder = folder_of(run, out)
    report = folder / "report.json"
    predicted = prediction(run, ranks, args)
    if args.reuse and report.exists():  # what was measured stays, what is predicted is this version's
        return {**load_report(report), "predicted": predicted if "categories" in predicted else None}
    folder.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    (folder / "predicted.json").write_text(json.dumps(predicted))
    launcher = [sys.executable]
    if not run.startswith("torch:"):
        launcher += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    command = [*launcher, str(ROOT / "profiling/verify_worker.py"), "--run", run, "--shape", args.shape]
    command += ["--model_config", args.model_config, "--steps", str(args.steps), "--sample_hz", str(args.sample_hz)]
    command += ["--predicted", str(folder / "predicted.json"), "--output_dir", str(folder)]
    command += ["--memory_snapshot"] if args.memory_snapshot else []
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with open(folder / "log.txt", "w") as log:
        try:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            process.wait(args.timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # DeepSpeed's launcher passes it on to its ranks
            process.wait()
            return {"error": f"stopped after {args.timeout} s; see {folder / 'log.txt'}"}
    if report.exists() and process.returncode == 0:
        return load_report(report)
    lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return {"error": f"{(errors or ['no report'])[-1][-300:]}; see {folder / 'log.txt'}"}


def prediction(run: str, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """What profiling/predict.py says of this run, or ``{"error": why it cannot}``."""
    backend, optimizer, *options = run.split(":")
    options = dict(option.split("=") for option in options)
    tokens, micro_batches = map(int, args.shape.split("x"))
    try:
        return predict(
            Setting(
                model_config=args.model_config,
                optimizer=optimizer,
                zero=None if backend == "torch" else int(backend.removeprefix("zero")),
                gpus=ranks,
                seq=tokens,
                micro_batches=micro_batches,
                rank=int(options.get("r", 8)),
                explore=int(options.get("explore", 0)),
                states=options.get("states", "fp32"),
                checkpointing=options.get("checkpointing") == "1",
                liger=options.get("liger") == "1",
                bucket=int(options.get("bucket", 100_000_000)),
                contiguous=options.get("contiguous", "1") == "1",
                prefetch=int(options.get("prefetch", 100_000_000)),
                leaf=options.get("leaf") == "1",
                adamw_states=options.get("adamw", "full"),
                fused_head=options.get("head_loss") == "fused",
                head=options.get("head", "adamw"),
                embed=options.get("embed", "trained"),
            )
        )
    except PredictionError as error:
        return {"error": str(error)}


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_line(run: str, report: Mapping[str, Any]) -> str:
    if "error" in report:
        return f"{run}: {report['error']}"
    rank = max(report["ranks"], key=lambda rank: rank["breakdown"]["total"])
    peaks = rank["peaks"]
    predicted = (report["predicted"] or {}).get("allocated")
    return (
        f"{run}: allocated {gb(peaks['allocated'])} GB, reserved {gb(peaks['reserved'])}, "
        f"NVML {gb(peaks['nvml_device'])}, host {gb(peaks['host'])}; predicted {gb(predicted)} allocated"
    )


if __name__ == "__main__":
    main()
