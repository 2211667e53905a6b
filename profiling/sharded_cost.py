"""What training under FSDP2 costs: :mod:`profiling.cost_model`'s parts on sharded weights, and what is sent for them.

    python profiling/sharded_cost.py --model_config configs/models/llama-3.1-8b.json --gpus 1 2 4 8 64 1024 --shape 4096x2

Prints tokens/s of each GPU for AdamW and MoFaSGD where the host is not waited for: eight GPUs to a node, on NVLink, and between
nodes 400 Gb/s Ethernet a GPU. Beyond a node weights are sharded within each (HSDP), or over all.

A decoder layer is gathered in forward and again in backward, behind the kernels of the layer before. NCCL takes memory and
multiprocessors from those, so only a part of its time is hidden: ``EXPOSED`` of it is not, by the runs on two and four H200s.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # a script's first import folder is its own; this makes it the repository's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_mofa.kernels.int8 import GROUP
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
    total,
    trained,
)

__all__ = ["EXPOSED", "seconds_of_micro_batch", "seconds_of_step", "sharded_parts"]

EXPOSED = 0.75  # of the messages' time
_NODE = 8  # GPUs
_EIGHT_BITS = 1 + 1 / GROUP  # bytes a weight


def sharded_parts(model: Model, setting: RunSetting, inside: Machine, across: Machine) -> list[Part]:
    """The parts of one micro-batch of an FSDP2 run on each rank.

    Args:
        setting: ``replicas`` says on how many ranks each shard stands (HSDP).
        inside: rates between the ranks that share the weights out.
        across: between replicas.
    """
    shards, replicas = setting.gpus // setting.replicas, setting.replicas
    away = (shards - 1) / shards
    own = trained(model, setting)  # an output head that is a matrix has no gradient to send
    weights = (_EIGHT_BITS if setting.weights == "int8" else BF16) * own.elements + BF16 * own.adamw
    gathers = 2 if setting.reshard else 1
    if setting.gathered:
        gathers = 1 / setting.micro_batches
    gradients = BF16 * (own.adamw + (own.elements if setting.entry is None else 0))

    moved = gathers * 2 * weights * (1 + 1 / shards) + 2 * gradients  # into NCCL's buffers and out of them
    sent = (gathers * weights + gradients) * away
    # Replicas add their shards' gradients up: a reduce-scatter and an all-gather.
    between = 2 * gradients / shards * (replicas - 1) / replicas
    return [
        *micro_batch(model, setting, inside),
        Part("copies around messages", moved, seconds=moved / inside.copy),
        Part("gathered and reduced", sent=sent, seconds=EXPOSED * sent / inside.network),
        Part("reduced between replicas", sent=between, seconds=EXPOSED * between / across.network),
    ]


def seconds_of_micro_batch(model: Model, setting: RunSetting, inside: Machine, across: Machine) -> float:
    """Where neither the host nor another rank is waited for."""
    return total(sharded_parts(model, setting, inside, across))


def seconds_of_step(model: Model, setting: RunSetting, machine: Machine) -> float:
    """Of the optimizer, on each rank; ``machine`` between all ranks."""
    if setting.entry is not None:
        return total(optimizer_step(model, setting, machine))
    return machine.adamw * (model.elements + model.adamw) * setting.replicas / setting.gpus


def tokens_per_second(model: Model, setting: RunSetting) -> float:
    """Of each GPU, in nodes of eight."""
    between = H200 if setting.gpus <= _NODE else ETHERNET_400
    inside = H200 if setting.gpus // setting.replicas <= _NODE else ETHERNET_400
    seconds = setting.micro_batches * seconds_of_micro_batch(model, setting, inside, between)
    return setting.seq * setting.micro_batches / (seconds + seconds_of_step(model, setting, between))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 64, 1024])
    parser.add_argument("--shape", default="4096x2", metavar="TOKENSxMICRO_BATCHES")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args(argv)
    model = Model.read(args.model_config)
    print("| GPUs | weights sharded over | AdamW, tokens/s | MoFaSGD | ratio |\n|---|---|---|---|---|")
    for gpus in args.gpus:
        for shards in (gpus,) if gpus <= _NODE else (_NODE, gpus):
            common = f"fsdp2:{{}}:replicas={gpus // shards}:checkpointing={int(args.checkpointing)}"
            runs = (common.format("AdamW"), common.format(f"MoFaSGD:r={args.rank}"))
            settings = [RunSetting.parse(run, gpus=gpus, shape=args.shape) for run in runs]
            adamw, ours = (tokens_per_second(model, setting) for setting in settings)
            print(f"| {gpus} | {shards} | {adamw:.0f} | {ours:.0f} | {ours / adamw:.2f} |")


if __name__ == "__main__":
    main()
