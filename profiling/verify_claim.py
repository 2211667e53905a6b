"""Does MoFaSGD fine-tune LLaMA-3.1-8B in 29 GB, where AdamW takes 70? Measured, predicted, and every GB accounted for.

    ds-mofa verify --output_dir out/claim; from a clone python profiling/verify_claim.py

Trains in the paper's setting (arXiv 2507.08091: LLaMA-3.1-8B, bf16, batch 1, 1024 tokens, 8 micro-batches, no gradient
checkpointing; random weights), each run in processes of its own: on one GPU AdamW, MoFaSGD with HF's layers and loss,
MoFaSGD with liger-kernel's where that is installed, and LoRA where peft is; and where there are several GPUs, AdamW and
MoFaSGD under ZeRO-2, ZeRO-3 and FSDP2 on all of them. A run is written as in profiling/throughput.py:
BACKEND:OPTIMIZER[:OPTION=VALUE...].

Writes report.md, report.html, report.json and PNGs with a verdict on every claim; a folder with the report and the log
of every run; ``--reuse`` takes over the runs that a folder holds already, so that they need not come in one go. Without
a GPU (give a small --model_config) it measures the host's memory and says so.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch

from ds_mofa.profiler import load_report
from ds_mofa.profiler.claims import judge
from ds_mofa.profiler.predict import PredictionError, predict
from ds_mofa.profiler.report import SCHEMA_VERSION, environment, write_pages
from ds_mofa.profiler.report.masking import masked
from ds_mofa.profiler.report.units import shown
from ds_mofa.profiler.setting import RunSetting, SettingError
from profiling import verify_worker
from profiling.starting import environment as process_environment
from profiling.starting import launcher
from profiling.trainers import check_measurable

ONE_GPU = ("torch:AdamW", "torch:MoFaSGD:r=8", "torch:MoFaSGD:r=8:liger=1", "torch:LoRA:r=8")
SEVERAL = (
    "zero2:AdamW", "zero2:MoFaSGD:r=32", "zero3:AdamW", "zero3:MoFaSGD:r=32", "fsdp2:AdamW", "fsdp2:MoFaSGD:r=32",
)  # fmt: skip

# Starts verify_worker.py on a setting's ranks, with these words and its output into a log; returns its exit status, or
# None where it took longer than so many seconds.
Start = Callable[[RunSetting, Sequence[str], Path, int], int | None]


def main(argv: Sequence[str] | None = None, start: Start | None = None) -> None:
    """The command. ``start``: how a run is started; by default in processes of its own."""
    args = make_parser().parse_args(argv)
    out, model_config = Path(args.output_dir).resolve(), Path(args.model_config).resolve()
    os.chdir(ROOT)  # so that reports name files as everybody has them
    args.model_config = os.path.relpath(model_config) if model_config.is_relative_to(ROOT) else str(model_config)
    out.mkdir(parents=True, exist_ok=True)
    gpus = args.gpus if args.gpus is not None else max(1, torch.cuda.device_count())
    names = args.runs or [*ONE_GPU, *(SEVERAL if gpus > 1 else [])]
    try:
        wanted = [setting_of(run, gpus, args) for run in names]
    except SettingError as error:
        sys.exit(f"verify_claim.py: error: {error}")
    there = [setting.run for setting in wanted if args.reuse and (folder_of(setting, out) / "report.json").exists()]
    chosen, notes = can_run(wanted, there)
    if not args.runs and gpus == 1:
        notes.append("ZeRO-2, ZeRO-3 and FSDP2 on several GPUs were not run: this machine has one device.")

    runs = {}
    for setting in chosen:
        runs[setting.run] = one_run(setting, args, out, start or in_processes)
        print(one_line(setting.run, runs[setting.run]), flush=True)
    claims = judge(runs)
    document = {
        "schema_version": SCHEMA_VERSION,
        "kind": "claim",
        "created": max((r["created"] for r in runs.values() if "created" in r), default=None),
        "command": ["python", "profiling/verify_claim.py", *masked(sys.argv[1:] if argv is None else argv)],
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
    parser = argparse.ArgumentParser(
        prog="ds-mofa verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_config", default=str(ROOT / "configs/models/llama-3.1-8b.json"))
    parser.add_argument("--shape", default="1024x8", metavar="TOKENSxMICRO_BATCHES")
    parser.add_argument("--runs", nargs="+", metavar="BACKEND:OPTIMIZER[:OPTION=VALUE...]")
    parser.add_argument("--gpus", type=int, help="ranks of all runs but torch's; default: all devices")
    parser.add_argument("--steps", type=int, default=6, help="steps timed with the profiler, and as many without")
    parser.add_argument("--sample_hz", type=float, default=50.0)
    parser.add_argument("--timeout", type=int, default=400, help="seconds for one run")
    parser.add_argument("--memory_snapshot", action="store_true", help="keep each run's history for memory_viz")
    parser.add_argument("--reuse", action="store_true", help="do not repeat runs whose report is in the folder")
    parser.add_argument("--output_dir", default="out/claim")
    return parser


def setting_of(run: str, gpus: int, args: argparse.Namespace) -> RunSetting:
    """What a run's name says, before any of them has taken its minutes.

    Raises:
        SettingError: it cannot be measured.
    """
    ranks = 1 if run.startswith("torch:") else gpus
    setting = RunSetting.parse(run, model_config=args.model_config, shape=args.shape, gpus=ranks)
    check_measurable(setting)
    return setting


def can_run(settings: Sequence[RunSetting], there: Collection[str] = ()) -> tuple[list[RunSetting], list[str]]:
    """Those that this machine has the packages for, or whose runs are ``there``, and a note on each other."""
    chosen, notes = [], []
    for setting in settings:
        needed = {"peft": "peft"} if setting.optimizer == "LoRA" else {}  # modules, and the packages they are in
        needed |= {"liger_kernel": "liger-kernel"} if setting.liger else {}
        missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
        if setting.run in there:
            chosen.append(setting)
        elif missing:
            notes.append(f"{setting.run} was not run: {missing[0]} is not installed (pip install {missing[0]}).")
        elif setting.liger and not torch.cuda.is_available():
            notes.append(f"{setting.run} was not run: liger-kernel's kernels need a GPU.")
        else:
            chosen.append(setting)
    return chosen, notes


def folder_of(setting: RunSetting, out: Path) -> Path:
    """Where a run's report and log are."""
    return out / setting.run.replace(":", "_").replace("=", "")


def one_run(setting: RunSetting, args: argparse.Namespace, out: Path, start: Start) -> dict[str, Any]:
    """The report of a run, or ``{"error": why there is none}``."""
    folder = folder_of(setting, out)
    report = folder / "report.json"
    predicted = prediction(setting)
    if args.reuse and report.exists():  # what was measured stays, what is predicted is this version's
        return {**load_report(report), "predicted": predicted if "categories" in predicted else None}
    folder.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    (folder / "predicted.json").write_text(json.dumps(predicted))
    words = ["--run", setting.run, "--shape", args.shape, "--model_config", args.model_config]
    words += ["--gpus", str(setting.gpus)]
    words += ["--steps", str(args.steps), "--sample_hz", str(args.sample_hz), "--output_dir", str(folder)]
    words += ["--predicted", str(folder / "predicted.json"), *(["--memory_snapshot"] if args.memory_snapshot else [])]
    log = folder / "log.txt"
    status = start(setting, words, log, args.timeout)
    if status is None:
        return {"error": f"stopped after {args.timeout} s; see {log}"}
    if report.exists() and status == 0:
        return load_report(report)
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return {"error": f"{(errors or ['no report'])[-1][-300:]}; see {log}"}


def in_processes(setting: RunSetting, words: Sequence[str], log: Path, timeout: int) -> int | None:
    """A :data:`Start` with the launcher of the setting's backend."""
    command = [*launcher(setting), str(ROOT / "profiling/verify_worker.py"), *words]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=process_environment())
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher passes it on to its ranks
            process.wait()
            return None


def in_this_process(setting: RunSetting, words: Sequence[str], log: Path, timeout: int) -> int | None:
    """A :data:`Start` that starts nothing, for tests: one rank, whatever was asked for, and no limit of time."""
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            verify_worker.main(words)
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def prediction(setting: RunSetting) -> dict[str, Any]:
    """What profiling/predict.py says of this run, or ``{"error": why it cannot}``."""
    try:
        return predict(setting)
    except PredictionError as error:
        return {"error": str(error)}


def one_line(run: str, report: Mapping[str, Any]) -> str:
    """A measured run in a line; what was not measured is left out."""
    if "error" in report:
        return f"{run}: {report['error']}"
    peaks = max(report["ranks"], key=lambda rank: rank["breakdown"]["total"])["peaks"]
    names = {
        "allocated": "allocated",
        "traced": "traced",
        "reserved": "reserved",
        "nvml_device": "NVML",
        "host": "host",
    }
    if peaks["allocated"] is not None:
        del names["traced"]
    seen = [f"{label} {shown(peaks[name])}" for name, label in names.items() if peaks[name] is not None]
    predicted = report["predicted"]
    expected = f"; predicted {shown(predicted['allocated'])} allocated" if predicted else ""
    return f"{run}: {', '.join(seen)}{expected}"


if __name__ == "__main__":
    main()
