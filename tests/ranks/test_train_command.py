"""The training command on two ranks: what it prints and saves, and a run that SIGTERM stops and that is resumed.

In the process of a scene, which spares the start; tests/launch/test_train_command.py starts it as a user does.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from deepspeed import comm as dist
from launching import cases, on_ranks
from scenes.command import command, finished, make_inputs, saved_model, sigterm_before

from ds_mofa.phases import PHASES
from ds_mofa.profiler import load_report
from ds_mofa.profiler.measure.layers import verdict
from ds_mofa.step.step import MatrixStep
from tests.launch.commands import STEPS, losses_in

HALF = str(STEPS // 2)


def printed(ran, run: str | None = None) -> str:
    """By all ranks."""
    return "".join((result[run] if run else result)["output"] for result in ran.ranks)


def assert_same_model(ran) -> None:
    for ours, theirs in zip(ran.ranks, ran.before.ranks, strict=True):
        assert ours["weights"].keys() == theirs["weights"].keys() and theirs["weights"]
        for name, weight in ours["weights"].items():
            assert torch.equal(weight, theirs["weights"][name]), name


@on_ranks(finished)
def test_the_model_loads_and_is_the_trained_one(ran):
    first_rank = ran.ranks[0]
    losses = [entry["loss"] for entry in first_rank["history"] if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.2
    first, last = losses_in(printed(ran))
    assert last < first - 0.1
    assert first_rank["answer loss"] == pytest.approx(last, abs=0.006)


@on_ranks(finished)
def test_the_output_tells_the_story(ran):
    output = printed(ran)
    assert "shape.json, random weights, 0.1 M parameters, fp32" in output
    assert "MoFaSGD, ZeRO stage 2, lr 0.0012 (linear)" in output
    assert "batch: 4 sequences = 2 each on 2 ranks\n" in output
    assert output.count(f"    begins: anew, {STEPS} steps") == 1 and re.search(
        r"in force: lr [\d.]+, adamw_lr [\d.]+\n", output
    )
    assert "built successfully" not in output
    assert re.search(rf"{STEPS} steps, [\d,]+ tokens/s, peak memory [\d.]+ GB", output)
    assert output.count("model saved in model") == 1  # by one rank
    steps = [entry for entry in ran.ranks[0]["history"] if "tokens_per_second" in entry]
    assert len(steps) == STEPS and all(entry["tokens_per_second"] > 0 for entry in steps)
    assert ran.ranks[0]["events"]


def stopped(before: str) -> dict:
    """The same run, of which rank 1 gets SIGTERM half way; then resumed, under the memory profiler."""
    make_inputs()
    with sigterm_before(MatrixStep, "update", STEPS // 2, rank=1):
        ended = command("--output_dir", "stopped")
    unfinished = saved_model("stopped")
    dist.barrier()
    watched = ["--profile_memory", "--profile_hz", "50"]
    resumed = command("--output_dir", "stopped", "--resume_from_checkpoint", "last", *watched)
    report = Path("stopped/memory/report.json").absolute()
    return {
        "ended": ended, "unfinished": unfinished, "resumed": resumed, "weights": saved_model("stopped"),
        "report": json.dumps(load_report(report)),
    }  # fmt: skip


UNINTERRUPTED = cases(finished)


@on_ranks(stopped, after=UNINTERRUPTED)
def test_sigterm_to_one_rank_saves_on_all(ran):
    assert [result["ended"]["code"] for result in ran.ranks] == [143, 143]
    output = printed(ran, "ended")
    assert output.count(f"stopped by SIGTERM, saved stopped/checkpoint-{HALF}. Start the same command") == 1
    assert "--resume_from_checkpoint last" in output
    assert not any(result["unfinished"] for result in ran.ranks)  # nothing that looks like a finished model


@on_ranks(stopped, after=UNINTERRUPTED)
def test_a_resumed_run_ends_where_the_uninterrupted_one_did(ran):
    assert_same_model(ran)
    resumed = printed(ran, "resumed")
    assert resumed.count(f"    begins: at step {HALF} of {STEPS}, from stopped/checkpoint-{HALF}") == 1
    assert re.search(r"in force: lr ([\d.]+) \(now ([\d.]+)\), adamw_lr", resumed)  # half way of a linear schedule
    assert losses_in(printed(ran, "resumed")) == losses_in(printed(ran.before))


@on_ranks(stopped, after=UNINTERRUPTED)
def test_the_memory_profiler_reports_on_both_ranks(ran):
    assert "memory report: stopped/memory/report.html" in printed(ran, "resumed")
    report = json.loads(ran.ranks[0]["report"])
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    for rank in report["ranks"]:
        counts = {phase["name"]: phase["count"] for phase in rank["phases"]}
        assert counts.keys() == {"between phases", "forward", "backward", *PHASES}
        assert counts["forward"] == counts["backward"] == counts["apply"] == STEPS - STEPS // 2
        holds, text = verdict(rank["layers"])
        assert holds, text
    assert any("rank 0, 1: No CUDA device" in note for note in report["notes"])


def stopped_in_an_evaluation(before: str) -> dict:
    """SIGTERM to rank 1 in the first of two batches of the evaluation half way; resumed with another rate."""
    from launch.trainer import FineTuner

    make_inputs()
    evaluating = ["--output_dir", "evaluated", "--eval_strategy", "steps", "--eval_steps", HALF]
    with sigterm_before(FineTuner, "prediction_step", 3, rank=1):
        ended = command(*evaluating)
    resumed = command(*evaluating, "--resume_from_checkpoint", "last", "--learning_rate", "1e-3")
    return {"ended": ended, "resumed": resumed, "weights": saved_model("evaluated")}


@on_ranks(stopped_in_an_evaluation, after=UNINTERRUPTED)
def test_sigterm_in_an_evaluation_saves_on_all(ran):
    assert [result["ended"]["code"] for result in ran.ranks] == [143, 143]
    output = printed(ran, "ended")
    assert output.count(f"stopped by SIGTERM, saved evaluated/checkpoint-{HALF}. Start the same command") == 1
    assert f"step {HALF}: eval loss" not in output
    # The other rate is said not to be in force, and the run ends as if nothing had been.
    resumed = printed(ran, "resumed")
    assert resumed.count("resumed: lr 0.0012 of the checkpoint is in force, not 0.001 of the command line") == 1
    assert_same_model(ran)
    assert losses_in(resumed)[1] == losses_in(printed(ran.before))[1]


def no_step_at_all() -> dict:
    from launch.errors import UserError

    make_inputs()
    try:
        command("--output_dir", "model", "--dataloader_drop_last", "--per_device_train_batch_size", "1000")
    except UserError as error:
        return {"type": type(error).__name__, "message": str(error), "weights": saved_model("model")}
    return {"type": "nothing", "message": "", "weights": saved_model("model")}


@on_ranks(no_step_at_all)
def test_no_step_at_all_is_an_error_and_not_a_model(ran):
    said = r"--dataloader_drop_last: \d+ training examples .* than one batch, 1000 on each of 2 ranks"
    for result in ran.ranks:
        assert result["type"] == "UserError" and re.match(said, result["message"]), result  # which rank 0 alone prints
        assert not result["weights"]
