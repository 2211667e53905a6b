"""What a step of MoFaSGD costs: bytes, FLOPs and messages from shapes, and time on a given machine.

    python profiling/cost_model.py --model_config configs/models/llama-3.1-8b.json --rank 8 32 128 --gpus 1 2 64 1024

Counts are arithmetic (docs/cost_model.md has the formulas); the rates that turn them into time are measured on one kind
of machine, and so are two constants, of the SVD and of the host. docs/cost_model.md sets them beside the runs in
profiling/results/benchmarks. Prints, for each rank and number of GPUs (two on NVLink, more on 400 Gb/s Ethernet), what
a step sends, what AdamW would send, and tokens/s when neither the host nor a slower rank is waited for and nothing is
overlapped.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # a script's first import folder is its own; this makes it the repository's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_mofa.partition.layout import Layout
from ds_mofa.partition.subbatches import split
from ds_mofa.profiler.report.units import shown
from ds_mofa.profiler.setting import RunSetting, SettingError

FP64, FP32, BF16 = 8, 4, 2  # bytes
KERNELS = 140  # of one layer's forward and backward
LAUNCHES = {"reduce": 100, "factor update": 470, "apply": 100}  # the update's are of one sub-batch
# Besides, of exploring: counted as operations (of four shapes on one rank), not measured as the others.
EXPLORING = {"reduce": 10, "factor update": 350, "apply": 90}
# Kernels of the graphs that norm and update are where micro-batches are graphs, and besides, of exploring.
CAPTURED = {"reduce": (54, 16), "factor update": (290, 160)}


@dataclasses.dataclass(frozen=True)
class Model:
    """Shapes of a LLaMA-like decoder.

    Attributes:
        matrices: (m, n) of every matrix parameter.
        adamw: parameters that AdamW trains.
        layers, width, vocabulary: of the decoder.
    """

    matrices: tuple[tuple[int, int], ...]
    adamw: int
    layers: int
    width: int
    vocabulary: int

    @classmethod
    def read(cls, path: str | Path) -> "Model":
        """From a model config as in configs/models."""
        config = json.loads(Path(path).read_text())
        d, ff, layers, vocabulary = (
            config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
        )
        heads = config["num_attention_heads"]
        kv = config.get("head_dim", d // heads) * config["num_key_value_heads"]
        layer = [(d, d), (kv, d), (kv, d), (d, d), (ff, d), (ff, d), (d, ff)]
        tables = 1 if config.get("tie_word_embeddings") else 2
        return cls(tuple(layer * layers), tables * vocabulary * d + (2 * layers + 1) * d, layers, d, vocabulary)

    @property
    def elements(self) -> int:
        """Of all matrices: sum of m n."""
        return sum(m * n for m, n in self.matrices)

    @property
    def sides(self) -> int:
        """Rows of all factors: sum of m + n."""
        return sum(m + n for m, n in self.matrices)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of one kind of machine; the defaults are an H200's, measured on it.

    Attributes:
        copy: bytes/s that a device copy reads and writes.
        gemm: FLOP/s of bf16 products inside a training step.
        attention: FLOP/s of its attention kernels.
        gemm64: FLOP/s of float64 products of tall matrices.
        write: share of ``copy`` that the write to W reaches.
        capture: share of ``copy`` that the sketch kernels reach; ``sketching`` their FLOP/s.
        per_token: seconds of elementwise kernels per token, layer and unit of width; ``per_logit`` of the loss, per logit.
        per_kernel: seconds that a kernel takes however little it has to do; HF's layers have 140 of them each.
        adamw: seconds of fused AdamW per parameter, weights and states in bf16.
        zero_adamw: seconds per parameter of a rank's partition of DeepSpeed's whole AdamW step, fp32 states;
            ``zero_floor`` what it takes with none, ``zero3_floor`` in stage 3.
        svd: seconds per core and r^3; ``svd_floor`` what a batch takes however small.
        launch: seconds in which the host launches one of the step's operations; ``node`` after which a small kernel of a graph
            follows the one before.
        gemm8: FLOP/s of products in e4m3 inside a step; ``round8`` the share of ``copy`` that rounding to it reaches.
        fused: what is left of ``per_token`` where liger-kernel or torch.compile has fused the layers, and of ``per_logit`` by
            a fused loss.
        write8: seconds in which a weight of eight bits is written.
        network: bytes/s per GPU and direction; ``latency`` seconds per message and log2(GPUs).
    """

    copy: float = 4.25e12
    gemm: float = 650e12
    attention: float = 465e12
    gemm64: float = 55e12
    write: float = 0.79
    capture: float = 0.7
    sketching: float = 300e12
    per_token: float = 15e-6 / (32 * 4096)
    per_logit: float = 15e-12
    per_kernel: float = 1.2e-6
    adamw: float = 7.5e-3 / 1.05e9
    zero_adamw: float = 30e-12
    zero_floor: float = 5e-3
    zero3_floor: float = 11e-3
    svd: float = 28.3e-3 / (224 * 128**3)
    svd_floor: float = 1e-3
    launch: float = 20e-6
    node: float = 3.5e-6
    gemm8: float = 1530e12
    round8: float = 0.86
    fused: float = 0.15
    write8: float = 2.83e-12
    network: float = 380e9
    latency: float = 20e-6


H200 = Machine()  # two of them, over NVLink
ETHERNET_400 = dataclasses.replace(H200, network=400e9 / 8 * 0.8, latency=30e-6)  # 400 Gb/s a GPU, 80 % of it reached


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a step on one rank: what it moves, computes and sends, and the seconds it takes."""

    name: str
    bytes: float = 0.0
    flops: float = 0.0
    sent: float = 0.0
    messages: int = 0
    seconds: float = 0.0


def optimizer_step(model: Model, setting: RunSetting, machine: Machine, captured: bool | None = None) -> list[Part]:
    """The parts of one optimizer step of MoFaSGD on each rank; without ZeRO all is in bf16.

    Args:
        captured: norm and update are CUDA graphs; by default where micro-batches are. The costs of ``explore`` are measured
            there alone, and counted elsewhere.
    """
    model, captured = trained(model, setting), setting.graphed if captured is None else captured
    rank, gpus, stage, explore = setting.rank, setting.gpus, setting.zero, sketch_columns(setting) - setting.rank
    # Where every process owns every matrix there is an all-reduce of the sketches, and nothing to gather.
    owners, whole = setting.owners, setting.backend == "ddp"
    r, share = rank, rank * model.sides / owners  # elements of this rank's factors
    beside = explore * model.sides / owners  # and of the directions that it finds beside them
    away = (gpus - 1) / gpus

    def send(sent: float) -> float:
        return seconds_to_send(sent, gpus, machine)

    def launched(part: str) -> float:
        return (LAUNCHES[part] + (EXPLORING[part] if explore else 0)) * machine.launch

    def replayed(part: str) -> float:
        kernels, exploring = CAPTURED[part]
        return (kernels + (exploring if explore else 0)) * machine.node

    flat = (rank + explore) * model.sides * FP32
    grams = 6 * FP32 + 4 * FP64  # U and Y read, [U Y] written and read in float64, per element of the factors
    gram_flops = 8 * r * share
    reduce_bytes = 3 * flat + grams * share
    reduce = Part("reduce", reduce_bytes, gram_flops, flat * away * (2 if whole else 1), 1)
    seconds = reduce_bytes / machine.copy + gram_flops / machine.gemm64
    seconds = seconds + replayed("reduce") if captured else max(launched("reduce"), seconds)
    reduce = _timed(reduce, seconds + send(reduce.sent))

    moved, flops = 200 * share, 20 * r * share  # docs/cost_model.md counts them
    if explore and captured:
        moved, flops = moved + 74 * share + 86 * beside, flops + 2 * r * share + (12 * r + 6 * explore) * beside
    elif explore:
        moved, flops = moved + 110 * share + 230 * beside, flops + 6 * r * share + 6 * (r + 2 * explore) * beside
    cores = len(model.matrices) / owners
    svd = machine.svd_floor + machine.svd * cores * r**3
    if explore:  # two of k x k a matrix, where the core is 2 r x 2 r
        svd += machine.svd_floor + machine.svd * 2 * cores * (explore / 2) ** 3
    update = Part("factor update", moved, flops)
    seconds = moved / machine.copy + flops / machine.gemm64 + svd
    host = sub_batches(model, setting) * (launched("factor update") + svd_launches(rank) * machine.launch)
    update = _timed(update, seconds + replayed("factor update") if captured else max(host, seconds))

    working = (rank + explore) * model.sides * BF16
    gather = Part("gather") if whole else Part("gather", 2 * working / gpus, 0.0, working * away, 1)
    gather = _timed(gather, send(gather.sent) if gather.messages else 0.0)

    shards = gpus if stage == 3 else gpus // setting.replicas if setting.sharded else 1
    held = model.elements / shards
    written = 2 * (1 if setting.weights == "int8" else BF16) * held
    seconds = machine.write8 * held if setting.weights == "int8" else written / (machine.write * machine.copy)
    if explore:  # on every rank, of all matrices: the columns of the update joined, the signs drawn and drawn again
        columns = (4 * (r + 2 * explore) + 25 * explore) * model.sides
        written, seconds = written + columns, seconds + columns / machine.copy
    apply = _timed(Part("apply", written, 2 * (r + 2 * explore) * held), max(launched("apply"), seconds))

    if stage is None:
        adamw = _timed(Part("AdamW", 7 * BF16 * model.adamw / shards), machine.adamw * model.adamw / shards)
    else:
        part = model.adamw / gpus
        sent = BF16 * model.adamw * away
        floor = machine.zero3_floor if stage == 3 else machine.zero_floor
        seconds = floor + machine.zero_adamw * part + send(sent)
        adamw = _timed(Part("AdamW", 34 * part, 0.0, sent, 1), seconds)
    return [reduce, adamw, update, gather, apply]


def seconds_to_send(sent: float, gpus: int, machine: Machine) -> float:
    """Of one message between so many GPUs, of which each sends ``sent`` bytes; 0 where there is one."""
    return sent / machine.network + machine.latency * math.log2(gpus) if gpus > 1 else 0.0


def trained(model: Model, setting: RunSetting) -> Model:
    """The model with its output head and embedding among the matrices where the setting says so."""
    table = (model.vocabulary, model.width)
    tables = (setting.head == "matrix") + any("embed" in pattern for pattern in setting.option("include", ()))
    adamw = model.adamw - tables * model.vocabulary * model.width
    return dataclasses.replace(model, matrices=(*model.matrices, *[table] * tables), adamw=adamw)


def sketch_columns(setting: RunSetting) -> int:
    """Of the sketches and of what is sent: those of the rule's state, and those that it explores."""
    rule = setting.rule()
    return setting.rank if rule is None else rule.columns


def sub_batches(model: Model, setting: RunSetting) -> int:
    """How many times a rank launches the factor update; see the option ``update_bytes``. Of exploring as the measured runs
    had it, whose bound took the explored columns for the state's.
    """
    layout = Layout([(shape, 0) for shape in model.matrices], sketch_columns(setting), setting.owners)
    return len(split(layout.owned_by(0), setting.option("update_bytes")))


def svd_launches(rank: int) -> int:
    """Rounds of the block Jacobi SVD (ds_mofa/kernels/svd.py), by which cores of more than 64 columns are decomposed."""
    columns = 2 * rank
    return 17 * (-(-columns // 32) * 2 - 1) if columns > 64 else 0


def micro_batch(model: Model, setting: RunSetting, machine: Machine) -> list[Part]:
    """The kernels of one micro-batch's forward and backward: with sketches, or with weight gradients, as AdamW's."""
    tokens = setting.seq
    head = model.vocabulary * model.width
    again = 1 if setting.checkpointing else 0  # forward of the layers
    of_layers = (4 + 2 * again) * model.elements * tokens
    of_head = (4 if setting.head == "matrix" else 6) * head * tokens
    attention = (7 + 2 * again) * tokens**2 * model.width * model.layers
    seconds = of_layers / (machine.gemm8 if setting.option("fp8") else machine.gemm) + of_head / machine.gemm
    parts = [
        _timed(Part("products", flops=of_layers + of_head), seconds),
        _timed(Part("attention", flops=attention), attention / machine.attention),
    ]
    if setting.option("fp8"):  # activations, output gradients and weights, the latter by rows and by columns
        rounded = 3 * (tokens * model.sides + (2 + again) * model.elements)
        parts.append(_timed(Part("rounding", rounded), rounded / (machine.round8 * machine.copy)))
    if setting.weights == "int8":
        widened = 3 * (2 + again) * model.elements
        parts.append(_timed(Part("widening", widened), widened / machine.copy))
    per_token = machine.per_token * (machine.fused if setting.liger or setting.compiled else 1)
    elementwise = model.layers * (per_token * model.width * tokens + machine.per_kernel * KERNELS)
    elementwise *= 1 + again / 3
    loss = machine.per_logit * (machine.fused if setting.liger or setting.option("fused_head") else 1)
    elementwise += loss * model.vocabulary * tokens
    parts.append(_timed(Part("elementwise", elementwise * machine.copy), elementwise))
    if setting.entry is None:
        flops = 2 * model.elements * tokens
        accumulated = 3 * BF16 * model.elements  # the sum of the micro-batches' gradients
        seconds = flops / machine.gemm + accumulated / machine.copy
        parts.append(_timed(Part("weight gradients", accumulated, flops), seconds))
    else:
        sides = model.sides + (model.vocabulary + model.width if setting.head == "matrix" else 0)
        read = 2 * BF16 * tokens * sides  # activations and output gradients, once for each pair of products
        flops = 4 * sketch_columns(setting) * tokens * sides
        seconds = read / (machine.capture * machine.copy) + flops / machine.sketching
        parts.append(_timed(Part("capture", read, flops), seconds))
    return parts


def adamw_sends(model: Model, gpus: int, reductions: int) -> float:
    """Bytes that a rank sends per step when AdamW trains everything: each reduction of the gradients, weights once."""
    return BF16 * (model.elements + model.adamw) * (gpus - 1) / gpus * (reductions + 1)


def total(parts: list[Part]) -> float:
    """Seconds of parts that follow each other."""
    return sum(part.seconds for part in parts)


def _timed(part: Part, seconds: float) -> Part:
    return dataclasses.replace(part, seconds=seconds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", required=True)
    parser.add_argument("--rank", type=int, nargs="+", default=[32])
    parser.add_argument("--explore", type=int, default=0, help="random directions beside the rank")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 64, 1024])
    parser.add_argument("--zero", type=int, default=2, choices=[0, 1, 2, 3])
    parser.add_argument("--shape", default="1024x8", metavar="TOKENSxMICRO_BATCHES")
    args = parser.parse_args(argv)
    model = Model.read(args.model_config)
    try:
        setting = RunSetting.from_args(args, rank=args.rank[0], gpus=1, zero=None)
    except SettingError as error:
        sys.exit(f"cost_model.py: error: {error}")
    tokens, micro_batches = setting.seq, setting.micro_batches
    print(
        "| r | GPUs | network | a rank sends per step | AdamW would | both send for | optimizer step | tokens/s per GPU |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for rank in args.rank:
        for gpus in args.gpus:
            machine, network = (H200, "NVLink" if gpus > 1 else "none") if gpus <= 2 else (ETHERNET_400, "400 Gb/s")
            here = setting.but(rank=rank, gpus=gpus, zero=None if gpus == 1 else args.zero)
            parts = optimizer_step(model, here, machine)
            reductions = micro_batches if args.zero >= 2 else 1
            # Of what AdamW trains beside the matrices, ZeRO-3 alone sends the gradients with every micro-batch.
            gradients = BF16 * model.adamw * (gpus - 1) / gpus * (micro_batches if args.zero == 3 else 1)
            sent = sum(part.sent for part in parts) + gradients
            adamw = adamw_sends(model, gpus, reductions)
            kernels = total(micro_batch(model, here, machine))
            seconds = micro_batches * kernels + total(parts) + gradients / machine.network
            print(
                f"| {rank} | {gpus} | {network} | {shown(sent)} | {shown(adamw)} | "
                f"{sent / machine.network * 1e3:.0f} and {adamw / machine.network * 1e3:.0f} ms | "
                f"{total(parts) * 1e3:.0f} ms | {tokens * micro_batches / seconds:.0f} |"
            )


if __name__ == "__main__":
    main()
