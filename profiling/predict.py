"""How much memory a training run will take, without a GPU.

    ds-mofa predict --model_config llama-3.1-8b --optimizer MoFaSGD --zero 2 --gpus 2
    ds-mofa predict --model_config llama-3.1-8b --optimizer AdamW MoFaSGD LoRA
    ds-mofa predict --model_config llama-3.1-8b --backend fsdp2 --gpus 2 --weights fp32
    ds-mofa predict --model_config llama-3.1-8b --fit 24GiB
    from a clone: python profiling/predict.py --model_config configs/models/llama-3.1-8b.json ...

Prints the peak of the fullest rank by category, a column for each optimizer; --output also writes it as JSON. How
each term is derived, and how far measured runs were from it, is in docs/memory.md.

--fit prints for a card of that size the longest sequence, the largest micro-batch and the highest rank with which the run
fits, each with the two others as given, and then the same with each switch that saves memory on top of those before it. It
asks for a dozen predictions a row: for an 8B one to five minutes of one core.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_mofa.options import Options
from ds_mofa.profiler.categories import CATEGORIES
from ds_mofa.profiler.predict import predict
from ds_mofa.profiler.predict.fitting import STEPS, Fit, bytes_of, fits
from ds_mofa.profiler.report.units import shown
from ds_mofa.profiler.setting import BACKENDS, RunSetting, SettingError, known_optimizers


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    args.rank, args.explore = rank_and_explore(args.rank, args.explore)
    try:
        settings = {name: RunSetting.from_args(args, optimizer=name) for name in args.optimizer}
        if args.fit is None:
            found: dict[str, Any] = {name: predict(setting) for name, setting in settings.items()}
            print(table(found))
        else:
            found = {name: list(shown_fits(setting, args.fit)) for name, setting in settings.items()}
    except SettingError as error:
        sys.exit(f"ds-mofa predict: error: {error}")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n")


def rank_and_explore(rank: int | None, explore: int | None) -> tuple[int, int]:
    """What is in force where the command line says one of them, or neither: as of the optimizer itself."""
    said = {name: value for name, value in (("rank", rank), ("explore", explore)) if value is not None}
    completed = Options.completed(said)
    return completed["rank"], completed.get("explore", Options.explore)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds-mofa predict",
        usage="%(prog)s --model_config MODEL [OPTIONS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model_config",
        metavar="MODEL",
        required=True,
        help="a model's config.json, or for ds-mofa a name of `ds-mofa config`",
    )
    parser.add_argument(
        "--optimizer", nargs="+", default=["MoFaSGD"], metavar="NAME", help=", ".join(known_optimizers())
    )
    backend = parser.add_mutually_exclusive_group()
    backend.add_argument(
        "--backend", default=argparse.SUPPRESS, choices=BACKENDS, help="default: torch, a plain loop on one GPU"
    )
    backend.add_argument(
        "--zero", default=argparse.SUPPRESS, choices=["none", "0", "1", "2", "3"], help="short for --backend zeroN"
    )
    parser.add_argument("--gpus", type=int, default=1, help="how many train (1)")
    parser.add_argument("--seq", type=int, default=1024, help="tokens of a sequence (1024)")
    parser.add_argument("--micro_batch", type=int, default=1, help="sequences of one forward (1)")
    parser.add_argument("--micro_batches", type=int, default=8, help="of one optimizer step, gradient accumulation (8)")
    parser.add_argument("--rank", type=int, help="of ds_mofa's optimizers and of LoRA; default: 32, and explore 32")
    parser.add_argument(
        "--explore", type=int, help="random directions beside the rank, of MoFaSGD; with --rank 0 by default"
    )
    parser.add_argument("--states", default="fp32", choices=["fp32", "bf16"], help="DeepSpeed's masters and moments")
    parser.add_argument(
        "--weights",
        default="bf16",
        choices=["bf16", "fp32", "int8"],
        help="int8: the matrices in eight bits; fp32: FSDP2's shards, gathered in bf16",
    )
    parser.add_argument(
        "--no_reshard", dest="reshard", action="store_false", help="FSDP2's reshard_after_forward of the layers off"
    )
    parser.add_argument(
        "--gathered", action="store_true", help="FSDP2 gathers weights once a step, and not for each micro-batch"
    )
    parser.add_argument("--replicas", type=int, default=1, help="of each of FSDP2's shards: HSDP")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in backward")
    parser.add_argument(
        "--graphed", action="store_true", help="a micro-batch is one CUDA graph (GraphedMicroBatch); torch and ddp"
    )
    parser.add_argument("--liger", action="store_true", help="liger-kernel's fused norms, rotary, SwiGLU and loss")
    parser.add_argument("--loss", default="model", choices=["model", "trl"], help="whose: TRL's SFTTrainer has its own")
    parser.add_argument("--bucket", type=int, default=100_000_000, help="DeepSpeed's reduce_bucket_size, elements")
    parser.add_argument(
        "--no_contiguous", dest="contiguous", action="store_false", help="DeepSpeed's contiguous_gradients off"
    )
    parser.add_argument("--prefetch", type=int, default=100_000_000, help="its stage3_prefetch_bucket_size, elements")
    parser.add_argument("--leaf", action="store_true", help="its leaf_module: stage 3 gathers a decoder layer as one")
    parser.add_argument(
        "--adamw_reduce", default="step", choices=["step", "micro_batch"], help="option of ds_mofa's, in ZeRO-2"
    )
    parser.add_argument("--adamw_states", default="full", choices=["full", "8bit"], help="likewise")
    parser.add_argument("--fused_head", action="store_true", help="likewise; instead of liger-kernel's loss")
    parser.add_argument("--head", default="adamw", choices=["adamw", "matrix"], help="what trains the output head")
    parser.add_argument("--embed", default="trained", choices=["trained", "frozen"], help="the embedding")
    parser.add_argument(
        "--offload",
        choices=["optimizer", "param"],
        help="DeepSpeed's offload_optimizer to the host, or that and offload_param; FSDP2's CPUOffloadPolicy is param",
    )
    parser.add_argument(
        "--include",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="names of what else is a matrix, of ds_mofa's optimizers",
    )
    parser.add_argument(
        "--fit", type=_size, metavar="SIZE", help="say what fits a card of this size, such as 24GiB or 141GB"
    )
    parser.add_argument("--output", help="JSON file to write")
    return parser


def _size(text: str) -> int:
    try:
        return bytes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def shown_fits(setting: RunSetting, room: int) -> Iterator[dict[str, Any]]:
    """What fits, printed row by row as it is found, and as data."""
    print(f"{setting.optimizer} in {shown(room)}, which is {room / 2**30:.4g} GiB\n")
    shape = f"{setting.seq} x {setting.micro_batch}" + (f", r = {setting.rank}" if setting.has_rank else "")
    columns = ["run", f"needs at {shape}", "gains", "longest sequence", "largest micro-batch", "highest rank"]
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    refused: list[str] = []
    before: Fit | None = None
    limited = False
    for fit in fits(setting, room):
        if fit.refused:
            refused.append(f"{fit.switch}: {fit.refused}")
            continue
        needs = shown(fit.needs) + (f" and {shown(fit.host)} of the host" if fit.host else "")
        gains = "" if before is None else shown(before.needs - fit.needs)
        cells = [
            fit.switch if before is None else f"+ {fit.switch}",
            needs,
            gains,
            *(_most(fit, name) for name in STEPS),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        limited = limited or any(_at_limit(fit, name) for name in fit.most)
        if before is None or fit.gains_over(before):
            before = fit
        yield {**dataclasses.asdict(fit), "setting": fit.setting.as_dict()}
    steps = f"Sequences in steps of {STEPS['seq']} tokens; each with the two others as given"
    print(f"\n{steps}. +: on top of those before it that gain something.")
    print("-: does not fit. Without the allocator's slack, which it gives back when memory is short.")
    if limited:
        print("*: more was not tried; the model has no more positions, or its smallest matrix no more rows or columns.")
    print("".join(f"Not possible: {line}\n" for line in refused))


def _at_limit(fit: Fit, name: str) -> bool:
    """Whether more was not tried."""
    return fit.limits[name] - fit.most[name] < STEPS[name]


def _most(fit: Fit, name: str) -> str:
    if name not in fit.most:
        return ""
    return f"{fit.most[name]:,}{'*' if _at_limit(fit, name) else ''}" if fit.most[name] else "-"


def table(predictions: Mapping[str, Mapping[str, Any]]) -> str:
    """The predictions as a Markdown table, each number in the unit of its size."""
    columns = list(predictions.values())
    rows = {name: [column["categories"].get(name, 0) for column in columns] for name in CATEGORIES}
    rows["**allocated**"] = [column["allocated"] for column in columns]
    rows["**on the device**"] = [column["total"] for column in columns]
    rows["**offloaded to the host**"] = [column["host"] for column in columns]
    lines = ["| GB are 1e9 bytes | " + " | ".join(predictions) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| {name} | " + " | ".join(map(shown, sizes)) + " |" for name, sizes in rows.items() if any(sizes)]
    lines.append("| peak at | " + " | ".join(column["when"] for column in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
