"""What training costs where each GPU holds the whole model: :mod:`profiling.cost_model`'s parts, and the mean of the gradients.

    python profiling/replicated_cost.py --model_config configs/models/llama-3.1-8b.json --gpus 1 8 64 1024 --shape 4096x2

Prints tokens/s of each GPU for AdamW and MoFaSGD, micro-batches as CUDA graphs, with embedding and head among the matrices:
on NVLink up to eight GPUs, and beyond on 400 Gb/s Ethernet a GPU, as if none had NVLink. Nothing is hidden: gradients go out
when the last micro-batch is over, and the sketches in the step.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # a script's first import folder is its own; this makes it the repository's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_mofa.profiler.setting import RunSetting
from profiling.cost_model import (
    BF16,
    ETHERNET_400,
    H200,
    Machine,
    Model,
    Part,
    micro_batch,
    optimizer_step,
    seconds_to_send,
    total,
    trained,
)

__all__ = ["mean_of_gradients", "tokens_per_second"]

_NODE = 8  # GPUs
_RUN = "ddp:{}:graphed=1:liger=1"
_OURS = "MoFaSGD:r={}:include=embed_tokens:head=matrix:fused_head=1"


def mean_of_gradients(model: Model, setting: RunSetting, machine: Machine) -> Part:
    """An all-reduce of whatever has a gradient, once a step, after each was divided by the number of processes."""
    own, gpus = trained(model, setting), setting.gpus
    gradients = BF16 * (own.adamw + (own.elements if setting.entry is None else 0))
    if gpus == 1:
        return Part("mean of gradients")
    sent = 2 * gradients * (gpus - 1) / gpus
    seconds = 2 * gradients / machine.copy + seconds_to_send(sent, gpus, machine)
    return Part("mean of gradients", 2 * gradients, 0.0, sent, 1, seconds)


def tokens_per_second(model: Model, setting: RunSetting, machine: Machine | None = None) -> float:
    """Of each GPU.

    Args:
        machine: between all; by default NVLink up to eight GPUs, and Ethernet beyond.
    """
    if machine is None:
        machine = H200 if setting.gpus <= _NODE else ETHERNET_400
    seconds = setting.micro_batches * total(micro_batch(model, setting, machine))
    seconds += mean_of_gradients(model, setting, machine).seconds
    if setting.entry is None:
        seconds += machine.adamw * (model.elements + model.adamw)
    else:
        seconds += total(optimizer_step(model, setting, machine))
    return setting.seq * setting.micro_batches / seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 64, 1024])
    parser.add_argument("--shape", default="1024x8", metavar="TOKENSxMICRO_BATCHES")
    args = parser.parse_args(argv)
    model = Model.read(args.model_config)
    print("| GPUs | AdamW, tokens/s | MoFaSGD | with fp8 | ratio, without |\n|---|---|---|---|---|")
    for gpus in args.gpus:
        ours = _OURS.format(args.rank)
        runs = [_RUN.format(optimizer) for optimizer in ("AdamW", ours, f"{ours}:fp8=1")]
        found = [tokens_per_second(model, RunSetting.parse(run, gpus=gpus, shape=args.shape)) for run in runs]
        print("|", gpus, "|", " | ".join(f"{speed:.0f}" for speed in found), f"| {found[1] / found[0]:.2f} |")


if __name__ == "__main__":
    main()
