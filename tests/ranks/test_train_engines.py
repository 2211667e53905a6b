"""The training command without DeepSpeed on two ranks, DDP and FSDP2: what it trains, saves, and goes on from.

What the engines have in common is shown by test_train_command.py, under DeepSpeed.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from deepspeed import comm as dist
from launching import cases, on_ranks
from scenes.command import command, finished, make_inputs, saved_model, sigterm_before

from ds_mofa.kernels.int8 import Int8Weight
from ds_mofa.profiler import load_report
from launch.fsdp import FULL, SHARDED, written_as
from tests.launch.commands import STEPS, answer_loss, losses_in

HALF = STEPS // 2
UNDER_ZERO2 = cases(finished)
SHARDED_CONFIG = ["--fsdp_config", f'{{"state_dict_type": "{SHARDED}"}}']


def printed(ran, run: str | None = None) -> str:
    """By all ranks."""
    return "".join((result[run] if run else result)["output"] for result in ran.ranks)


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest of any weight, relative to its norm."""
    assert ours.keys() == theirs.keys() and theirs
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


def as_under_zero2(before: str, engine: str) -> dict:
    return finished(engine)


@on_ranks(as_under_zero2, engine=["ddp", "fsdp2"], after=UNDER_ZERO2)
def test_the_engines_train_the_same_model(ran):
    result, reference = ran.ranks[0], ran.before.ranks[0]
    assert distance(result["weights"], reference["weights"]) < 5e-5
    assert distance(reference["half way"], reference["weights"]) > 1e-2  # what another training would be off by
    for ours, theirs in zip(result["history"], reference["history"], strict=True):
        for key in ours.keys() & {"loss", "grad_norm", "eval_loss", "num_tokens"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.2


@on_ranks(as_under_zero2, engine=["ddp", "fsdp2"], after=UNDER_ZERO2)
def test_the_banner_names_engine_and_ranks(ran):
    name = {"ddp": "DDP", "fsdp2": f"FSDP2 (CPU ranks, resharded after forward, checkpoints {FULL})"}[ran.engine]
    output = printed(ran)
    assert output.count(f"optimizer: MoFaSGD, {name}, lr 0.0012 (linear)") == 1
    assert "batch: 4 sequences = 2 each on 2 ranks\n" in output
    assert ran.ranks[0]["answer loss"] == pytest.approx(losses_in(output)[1], abs=0.006)


def as_graphs() -> dict:
    """With --cuda_graphs and without, two micro-batches a step. On a CPU nothing is captured."""
    make_inputs()
    words = ["--gradient_accumulation_steps", "2", "--max_steps", "3"]
    found = {}
    for name, more in (("graphed", ["--cuda_graphs"]), ("plain", [])):
        run = command(*words, *more, "--output_dir", name, engine="ddp")
        found[name] = {**run, "weights": saved_model(name)}
    return found


@on_ranks(as_graphs)
def test_ddp_with_cuda_graphs_is_ddp(ran):
    result = ran.ranks[0]
    assert distance(result["graphed"]["weights"], result["plain"]["weights"]) < 1e-5
    graphed, (before, after) = (losses_in(printed(ran, name)) for name in ("graphed", "plain"))
    assert graphed == pytest.approx((before, after), rel=1e-3) and after < before - 0.05


def stopped(engine: str, before: str) -> dict:
    """The same run, of which rank 1 gets SIGTERM half way; then resumed, under the memory profiler. Under FSDP2 the
    checkpoint is sharded.
    """
    from launch.trainer import FineTuner

    make_inputs()
    sharded = SHARDED_CONFIG if engine == "fsdp2" else []
    with sigterm_before(FineTuner, "training_step", HALF, rank=1):
        ended = command("--output_dir", "stopped", *sharded, engine=engine)
    cut, unfinished = written_as(f"stopped/checkpoint-{HALF}"), saved_model("stopped")
    dist.barrier()
    resume = ["--resume_from_checkpoint", "last", "--learning_rate", "1e-3", "--profile_memory", "--profile_hz", "50"]
    resumed = command("--output_dir", "stopped", *resume, engine=engine)
    return {
        "report": json.dumps(load_report(Path("stopped/memory/report.json").absolute())),
        "ended": ended, "cut": cut, "unfinished": unfinished, "resumed": resumed, "weights": saved_model("stopped"),
    }  # fmt: skip


UNINTERRUPTED = {engine: cases(as_under_zero2, engine=[engine], after=UNDER_ZERO2) for engine in ("ddp", "fsdp2")}


def check_stopped(ran, cut: str | None) -> None:
    assert [result["ended"]["code"] for result in ran.ranks] == [143, 143]
    assert printed(ran, "ended").count(f"stopped by SIGTERM, saved stopped/checkpoint-{HALF}. Start the same") == 1
    for result in ran.ranks:
        assert result["cut"] == cut and not result["unfinished"]
    # The checkpoint's rate is in force, and the run ends as if nothing had been.
    resumed = printed(ran, "resumed")
    assert resumed.count("resumed: lr 0.0012 of the checkpoint is in force, not 0.001 of the command line") == 1
    weights, reference = ran.ranks[0]["weights"], ran.before.ranks[0]["weights"]
    assert weights.keys() == reference.keys()
    assert all(torch.equal(weights[name], reference[name]) for name in reference)
    report = json.loads(ran.ranks[0]["report"])
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    for rank in report["ranks"]:
        counts = {phase["name"]: phase["count"] for phase in rank["phases"]}
        assert counts["forward"] == counts["backward"] == counts["apply"] == STEPS - HALF


@on_ranks(stopped, engine=["ddp"], after=UNINTERRUPTED["ddp"])
def test_ddp_goes_on_from_where_sigterm_has_stopped_it(ran):
    check_stopped(ran, None)


@on_ranks(stopped, engine=["fsdp2"], after=UNINTERRUPTED["fsdp2"])
def test_fsdp2_goes_on_from_a_sharded_checkpoint_too(ran):
    check_stopped(ran, SHARDED)


def best(engine: str, rate: float) -> dict:
    """Every step is evaluated and saved; batches are packed, and gradients add up."""
    make_inputs()
    words = ["--learning_rate", str(rate), "--lr_scheduler_type", "constant", "--gradient_accumulation_steps", "2"]
    words += ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps"]
    words += ["--save_steps", "1", "--packing", "--train_file", "eval.jsonl", "--output_dir", "model"]
    words += ["--optimizer_args", f'{{"adamw_lr": {rate / 10}, "adjust_lr_fn": "adamw"}}']
    run = command(*words, *(SHARDED_CONFIG if engine == "fsdp2" else []), engine=engine)
    if dist.get_rank() == 0:
        run["answer loss"] = answer_loss(Path("model"), Path("eval.jsonl"))
        run["folders"] = sorted(path.name for path in Path("model").glob("checkpoint-*"))
    return run


TOO_LARGE = 5.0  # the first step is the best
WITH_EITHER_RATE = [{"engine": engine, "rate": rate} for engine in ("ddp", "fsdp2") for rate in (TOO_LARGE, 0.01)]


@on_ranks(best, *WITH_EITHER_RATE)
def test_the_best_step_s_weights_are_the_saved_ones(ran):
    output = printed(ran)
    losses = {int(step): float(loss) for step, loss in re.findall(r"step (\d+): eval loss ([\d.]+)", output)}
    step = int(re.search(r"of the saved model, step (\d+)'s, the best", output).group(1))
    assert step == min(range(1, STEPS + 1), key=losses.get)
    assert losses[step] < losses[STEPS] - 0.5 if ran.rate == TOO_LARGE else step == STEPS
    assert ran.ranks[0]["answer loss"] == pytest.approx(losses[step], abs=0.006)
    assert ran.ranks[0]["folders"] == sorted({f"checkpoint-{kept}" for kept in (step, STEPS - 1, STEPS)})


def in_eight_bits(engine: str) -> dict:
    make_inputs()
    ended = command("--output_dir", "small", "--optimizer_args", '{"weights": "int8"}', engine=engine)
    return {**ended, "weights": saved_model("small")}


@on_ranks(in_eight_bits, engine=["ddp", "fsdp2"])
def test_matrices_in_eight_bits_are_saved_as_an_ordinary_model(ran):
    """Through the Trainer and Accelerate, which moves and shards the model after the optimizer is built."""
    output = printed(ran)
    (count,) = re.findall(r"ds_mofa: (\d+) matrices, .* are kept in eight bits", output)
    first, last = losses_in(output)
    assert ran.ranks[0]["code"] == 0 and last < first - 0.1
    for result in ran.ranks:
        weights = {name: weight for name, weight in result["weights"].items() if weight.dim() == 2}
        of_eight_bits = [
            name for name, weight in weights.items() if torch.equal(Int8Weight.of(weight).widened(), weight)
        ]
        assert len(of_eight_bits) == int(count) and "lm_head.weight" not in of_eight_bits
