"""Run a training command under Nsight Systems or Nsight Compute, with the optimizer's phases as named ranges.

    python profiling/nsight.py -- deepspeed launch/train.py --profile_memory ...        # a timeline of one step
    python profiling/nsight.py --capture all -- python train.py                         # of everything
    python profiling/nsight.py --tool ncu --phase "factor update" -- python train.py    # the kernels of one phase
    python profiling/nsight.py --summary out/nsight/report.nsys-rep --memory_report out/model/memory/report.json

With ``--capture step`` the timeline is of the step that the memory profiler records (the second), so the command has
to run one: ``--profile_memory``, or ``MemoryProfiler`` in your own loop. The ranges are forward, backward, capture,
reduce, factor update, gather, apply, AdamW; they too are opened by the memory profiler.

A timeline is exported and summarised afterwards: time by range and kernel, and memory operations.
"""

import argparse
import csv
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from ds_mofa.profiler.layout import fullest
from ds_mofa.profiler.report import load_report
from ds_mofa.profiler.report.units import unit_of

HOW_TO_GET = {
    "nsys": "Nsight Systems: https://developer.nvidia.com/nsight-systems/get-started, or from NVIDIA's CUDA repository "
    "`apt install cuda-nsight-systems-13-0` (or of another CUDA version). If it is installed, add its folder to PATH "
    "or give --program /path/to/nsys",
    "ncu": "Nsight Compute: https://developer.nvidia.com/tools-overview/nsight-compute/get-started, or from NVIDIA's "
    "CUDA repository `apt install cuda-nsight-compute-13-0` (or of another CUDA version). If it is installed, add its "
    "folder to PATH or give --program /path/to/ncu",
}
# Names in nsys's own words; a report that an older nsys cannot make is left out, and said to be.
REPORTS = ("nvtx_sum", "cuda_gpu_kern_sum", "cuda_gpu_mem_size_sum")


class NsightError(Exception):
    """What the user can put right; the message says how."""


def main(argv: list[str]) -> int:
    ours, command = split_command(argv)
    args = make_parser().parse_args(ours)
    if args.summary:
        print(summary(Path(args.summary), args.memory_report, args.program))
        return 0
    if not command:
        raise NsightError("no command to run: write it after --, such as nsight.py -- python train.py")
    program = find_program(args.tool, args.program)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    line, environment = wrap(args, program, command)
    print(shlex.join(line), flush=True)
    code = subprocess.run(line, env={**os.environ, **environment}).returncode
    if args.tool == "nsys":
        report = out / "report.nsys-rep"
        if not report.exists():
            raise NsightError(
                f"{report} was not written: the command ended with status {code}"
                + (", or the step to capture never came; --capture all records everything" if args.capture else "")
            )
        text = summary(report, args.memory_report, program)
        (out / "summary.md").write_text(text, encoding="utf-8")
        print(text)
    return code


def split_command(argv: list[str]) -> tuple[list[str], list[str]]:
    """(our words, the command's): what stands before and after ``--``."""
    return (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=["nsys", "ncu"], default="nsys", help="a timeline, or counters of kernels")
    parser.add_argument("--capture", choices=["step", "all"], default="step", help="nsys: what to record")
    parser.add_argument("--phase", default="factor update", help="ncu: the range whose kernels are measured")
    parser.add_argument("--launches", type=int, default=20, help="ncu: how many kernels")
    parser.add_argument("--program", help="path of nsys or ncu, where it is not on PATH")
    parser.add_argument("--output_dir", default="out/nsight")
    parser.add_argument("--summary", metavar="REPORT", help="summarise a report.nsys-rep, and run nothing")
    parser.add_argument("--memory_report", metavar="JSON", help="the memory profiler's report.json, to stand beside it")
    return parser


def find_program(tool: str, path: str | None) -> str:
    """Where the tool is.

    Raises:
        NsightError: nowhere; says how to get it.
    """
    found = shutil.which(path or tool)
    if found is None:
        raise NsightError(f"{path or tool} was not found. {HOW_TO_GET[tool]}")
    return found


def wrap(args: argparse.Namespace, program: str, command: list[str]) -> tuple[list[str], dict[str, str]]:
    """The whole command line, and what to add to its environment."""
    out = Path(args.output_dir)
    if args.tool == "nsys":
        line = [
            program,
            "profile",
            "--trace=cuda,nvtx,cublas,osrt",
            "--cuda-memory-usage=true",
            "--force-overwrite=true",
        ]
        line += ["--sample=none", f"--output={out / 'report'}"]
        if args.capture == "step":  # the profiler calls cudaProfilerStart and cudaProfilerStop around it
            line += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
        return [*line, *command], {}
    # A range of start and end, as ours are, is named bare; one of push and pop would end in a slash.
    line = [program, "--nvtx", "--nvtx-include", args.phase, "--launch-count", str(args.launches)]
    line += ["--target-processes=all", "--set=basic", "--force-overwrite", f"--export={out / 'report'}"]
    return [*line, *command], {}


def summary(report: Path, memory_report: str | None, program: str | None) -> str:
    """What nsys's own statistics say of a report, as Markdown, the memory profiler's figures beside it."""
    if not report.exists():
        raise NsightError(f"{report}: no such report")
    program = find_program("nsys", program)
    lines = [f"# Nsight Systems: {report}", ""]
    for name in REPORTS:
        command = [program, "stats", "--report", name, "--format", "csv", "--output", "-", "--force-export=true"]
        run = subprocess.run([*command, str(report)], capture_output=True, text=True)
        rows = read_csv(run.stdout)
        lines += [f"## {name}", ""]
        if rows:
            lines += [*as_table(rows[:15]), ""]
        else:
            why = (run.stderr.strip().splitlines() or ["it holds no such data"])[-1]
            lines += [f"Not in this report: {why}", ""]
    if memory_report:
        lines += ["## The memory profiler's phases", "", *memory_phases(memory_report), ""]
    return "\n".join(lines)


def read_csv(text: str) -> list[dict[str, str]]:
    """The table in what ``nsys stats`` prints, which begins with lines on its progress."""
    lines = text.splitlines()
    start = next(
        (i for i, line in enumerate(lines) if line.count(",") >= 2 and not line.startswith("Processing")), None
    )
    return [] if start is None else list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))


def as_table(rows: list[dict[str, str]]) -> list[str]:
    names = list(rows[0])
    head = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return head + ["| " + " | ".join(str(row[name])[:80].replace("|", "/") for name in names) + " |" for row in rows]


def memory_phases(path: str) -> list[str]:
    try:
        rank = fullest(load_report(path))
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise NsightError(f"{path}: no memory report could be read ({error})") from error
    unit = unit_of(phase["peak_allocated"] for phase in rank["phases"])
    rows = []
    for phase in rank["phases"]:
        row = {"phase": phase["name"], "times": f"{phase['count']:.0f}", "host ms": f"{phase['seconds'] * 1e3:.1f}"}
        if any(other["peak_allocated"] for other in rank["phases"]):  # there is no allocator to ask on a CPU
            row[f"peak allocated [{unit.name}]"] = unit.number(phase["peak_allocated"] or None)
        rows.append(row)
    return as_table(rows)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except NsightError as error:
        sys.exit(f"nsight.py: error: {error}")
