"""Step time, tokens/s and peak memory of MoFaSGD beside its competitors, each in a process of its own.

    python profiling/throughput.py --model_config configs/models/llama-3.1-8b.json --shapes 1024x8 4096x2 \
        --runs torch:AdamW torch:MoFaSGD:r=8 zero2:AdamW zero2:MoFaSGD:r=32 --output_dir out/throughput

A run is BACKEND:OPTIMIZER[:OPTION=VALUE...]. Backends: ``torch`` (one GPU; there LoRA too, with peft), ``ddp`` and
``fsdp2`` (torch's, with torchrun) and ``zero0`` to ``zero3`` (DeepSpeed's). Optimizers: AdamW, and all of ds_mofa's.

Options of FSDP2: ``weights`` (fp32: shards in fp32 that are gathered in bf16, gradients reduced in fp32), ``reshard`` (0:
layers stay gathered between forward and backward), ``gathered`` (1: from a step's first micro-batch to its last),
``replicas`` (HSDP: on how many ranks each shard stands), ``offload`` (param: CPUOffloadPolicy). Of DeepSpeed: ``states``
(fp32 or bf16: its master weights and optimizer states), ``bucket`` (its reduce_bucket_size), ``contiguous`` and ``overlap``
(0 or 1: its contiguous_gradients and overlap_comm), ``leaf`` (1: stage 3 gathers a decoder layer at a time rather than a
linear), ``prefetch`` (its stage3_prefetch_bucket_size), ``offload`` (optimizer or param: its offload_optimizer to the host,
or that and offload_param). Of all: ``r`` (rank), ``compiled`` (1:
each decoder layer by torch.compile), ``graphed`` (1: a micro-batch is one CUDA graph; of torch and ddp), ``checkpointing`` (1),
``liger`` (1: liger-kernel's fused norms, SwiGLU, rotary embedding and, where it is not graphed, loss, as HF's
``use_liger_kernel``), ``head`` (matrix:
the output head is one of the matrices), ``embed`` (frozen: the embedding stays as it is), ``card`` (GiB: run out of memory
where a GPU of that size would), and every option of the optimizer by its name, such as ``explore``, of which two have shorter
ones: ``head_loss`` (fused: ``fused_head`` instead of liger-kernel's loss) and ``adamw`` (8bit: ``adamw_states``). A shape is
TOKENSxMICRO_BATCHES, batch 1. Weights are random, bf16; attention is sdpa; the batch is the same in every step.

A run's process builds its model once and takes the shapes in their order, after --warmup steps of each.

Prints a line of JSON for each result and then a table, and writes results.csv and results.jsonl, with hardware, versions
and date. With --predict each has what profiling/predict.py says of it too; with --timeline there is a picture of one step of
each, a lane for each kind of kernel.
"""

import argparse
import csv
import datetime
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from ds_mofa.profiler.predict import PredictionError, predict
from ds_mofa.profiler.setting import RunSetting, SettingError
from profiling.starting import environment, launcher

WORKER = Path(__file__).with_name("throughput_worker.py")
COLUMNS = {
    "run": "run",
    "shape": "tokens x micro-batches",
    "micro_batch_ms": "fwd+bwd / micro-batch [ms]",
    "micro_batch_gpu_ms": "of it in kernels [ms]",
    "step_ms": "optimizer step [ms]",
    "tokens_per_second": "tokens/s per GPU",
    "mfu": "MFU",
    "peak_allocated_gb": "peak allocated [GB]",
    "predicted_allocated_gb": "predicted [GB]",
    "nvml_gb": "NVML used [GB]",
    "predicted_nvml_gb": "predicted [GB]",
    "losses": "mean loss of each step",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", required=True, help="shape of the model, such as configs/models/*.json")
    parser.add_argument("--runs", nargs="+", required=True, metavar="BACKEND:OPTIMIZER[:OPTION=VALUE...]")
    parser.add_argument("--shapes", nargs="+", default=["1024x8"], metavar="TOKENSxMICRO_BATCHES")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument(
        "--warmup", type=int, default=3, help="optimizer steps before measuring: the second still compiles"
    )
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps to measure; the median counts")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one run")
    parser.add_argument("--predict", action="store_true", help="predict each result's memory, while the run goes on")
    parser.add_argument("--timeline", action="store_true", help="a picture of one step of each result, NAME.png")
    parser.add_argument("--output_dir", default="out/throughput")
    args = parser.parse_args(argv)
    try:
        settings = [setting_of(run, args) for run in args.runs]
    except SettingError as error:
        sys.exit(f"throughput.py: error: {error}")
    if args.timeline and importlib.util.find_spec("matplotlib") is None:
        sys.exit(
            "throughput.py: error: --timeline draws by matplotlib: pip install 'ds_mofa[profile]', or leave it out"
        )

    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for setting in settings:
        for result in measure(setting, args, out):
            results.append(result)
            print(json.dumps(result), flush=True)
            with open(out / "results.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")
    results.sort(key=lambda result: args.shapes.index(result["shape"]))
    write_csv(results, out / "results.csv")
    print(table(results))
    if any("error" in result for result in results):
        sys.exit(f"some runs failed; their logs are in {out}")


def setting_of(run: str, args: argparse.Namespace) -> RunSetting:
    """What a run's name says, before any of them has taken its minutes.

    Raises:
        SettingError: it cannot be.
    """
    gpus = 1 if run.startswith("torch:") else args.gpus
    return RunSetting.parse(run, model_config=args.model_config, gpus=gpus)


def measure(setting: RunSetting, args: argparse.Namespace, out: Path) -> list[dict]:
    """One run in its own process (or processes): what its worker measured of each shape, or the end of its output."""
    run = setting.run
    name = run.replace(":", "_").replace("=", "")
    result_file, log = out / f"{name}.json", out / f"{name}.log"
    result_file.unlink(missing_ok=True)
    command = [*launcher(setting), str(WORKER), "--run", run, "--shapes", *args.shapes]
    command += ["--model_config", args.model_config, "--gpus", str(setting.gpus)]
    command += ["--warmup", str(args.warmup), "--steps", str(args.steps), "--result", str(result_file.resolve())]
    if args.timeline:
        command += ["--timelines", str(out.resolve())]
    predicted: dict[str, dict[str, Any]] = {}
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment())
        began = time.monotonic()
        if args.predict:
            predicted = {shape: prediction(setting.but(shape=shape)) for shape in args.shapes}
        try:
            process.wait(max(0.0, began + args.timeout - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher passes it on to its ranks
            process.wait()
            file.write(f"\nstopped after {args.timeout} s\n")
    measured = json.loads(result_file.read_text()) if result_file.exists() else {}
    errors = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    failed = {"error": (errors or [f"no result, see {log}"])[-1][-300:]}
    date = datetime.date.today().isoformat()
    return [
        {"run": run, "shape": shape, "gpus": setting.gpus, "date": date}
        | measured.get(shape, failed)
        | predicted.get(shape, {})
        for shape in args.shapes
    ]


def prediction(setting: RunSetting) -> dict[str, Any]:
    """What profiling/predict.py says of a run, in GB, or why it cannot."""
    try:
        found = predict(setting)
    except PredictionError as error:
        return {"not_predicted": str(error)}
    return {
        "predicted_allocated_gb": round(found["allocated"] / 1e9, 2),
        "predicted_nvml_gb": round(found["total"] / 1e9, 2),
        "predicted_host_gb": round(found["host"] / 1e9, 2),
    }


def write_csv(results: list[dict], path: Path) -> None:
    names = list(dict.fromkeys(name for result in results for name in result))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(results)


def table(results: list[dict]) -> str:
    """The results as a Markdown table, without the columns that no run fills."""
    shown = [name for name in COLUMNS if name == "micro_batch_ms" or any(name in result for result in results)]
    lines = ["| " + " | ".join(COLUMNS[name] for name in shown) + " |", "|" + " --- |" * len(shown)]
    for result in results:
        cells = [
            result.get("error", result.get(name, "")) if name == "micro_batch_ms" else result.get(name, "")
            for name in shown
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
