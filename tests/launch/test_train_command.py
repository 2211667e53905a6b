"""The command as a user starts it: ranks on a CPU, files in, a model folder out.

What a start decides: exit codes, a signal through the launcher, what stays behind. What a run computes and prints is
shown by tests/ranks/test_train_command.py, in processes that are there already.
"""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch.commands import (
    ROOT,
    STEPS,
    WITH_A_CHECKPOINT,
    answer_loss,
    assert_same_model,
    faulty,
    log_history,
    losses_in,
    make_inputs,
    start,
    succeeded,
    train,
    train_alone,
)
from tests.ports import free_port


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """One uninterrupted run of two ranks, with a checkpoint half way; (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("run")
    make_inputs(folder)
    output = succeeded(train(folder, *WITH_A_CHECKPOINT))
    return folder, output


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A run of which one rank gets SIGTERM half way."""
    folder = tmp_path_factory.mktemp("run")
    make_inputs(folder)
    return folder, faulty(folder, f"sigterm:{STEPS // 2}:1", "--output_dir", "model")


def test_sigterm_to_one_rank_saves_on_all(stopped):
    folder, run = stopped
    assert run.returncode == 143, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count(f"stopped by SIGTERM, saved model/checkpoint-{STEPS // 2}. Start the same command") == 1
    assert not (folder / "model/model.safetensors").exists()  # nothing that looks like a finished model


@pytest.mark.slow  # in every run tests/ranks/test_train_command.py resumes, in processes that are there
def test_the_same_command_goes_on_and_ends_well(stopped):
    folder, _ = stopped
    output = succeeded(train(folder, "--output_dir", "model", "--resume_from_checkpoint", "last"))
    assert output.count("model saved in model") == 1  # by one rank
    assert losses_in(output)[1] == pytest.approx(answer_loss(folder / "model", folder / "eval.jsonl"), abs=0.006)


@pytest.mark.slow
def test_sigterm_while_the_model_is_written_leaves_a_whole_one(finished):
    folder, _ = finished
    words = ["--output_dir", "written"]
    run = train(folder, *words, "--fault", "sigterm-model:1:0", script="tests/launch/faulty.py")
    assert "SIGTERM came while the model was being saved. It is whole" in succeeded(run)
    assert_same_model(folder / "model", folder / "written")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_is_killed_everywhere_ends_as_if_nothing_had_been(finished, rank):
    """Killed in a step, then in a save, then in a resume, then told to stop; resumed each time from the last whole."""
    folder, out = finished[0], f"killed{rank}"
    words = ["--output_dir", out, "--save_strategy", "steps", "--save_steps", "1"]

    def timed(fault: str, *more: str) -> str:
        began = time.monotonic()
        run = faulty(folder, f"{fault}:{rank}", *words, *more)
        assert time.monotonic() - began < 120  # start, some steps, and the end within the timeout of 60 s
        return run.stdout + run.stderr

    def checkpoints() -> list[str]:
        return sorted(path.name for path in (folder / out).glob("checkpoint-*"))

    timed("step:3")
    assert checkpoints() == ["checkpoint-1", "checkpoint-2"]
    resume = ["--resume_from_checkpoint", "last"]
    timed("save:2", *resume)  # of checkpoint-4
    assert checkpoints() == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert not (folder / out / "checkpoint-4/complete.json").exists()
    output = timed("resume:1", *resume)
    assert f"passed over {out}/checkpoint-4, which is not whole" in output
    output = timed("sigterm-all:2", *resume)
    assert f"stopped by SIGTERM, saved {out}/checkpoint-5" in output
    succeeded(train(folder, *words, *resume))
    assert checkpoints() == ["checkpoint-5", "checkpoint-6"]
    assert_same_model(folder / "model", folder / out)


def test_nothing_is_left_in_shared_memory(stopped):
    # Every name ends in the port and the rank, and the run above used a port of its own.
    port = re.search(r"--master_port=(\d+)", stopped[1].stdout).group(1)
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


def test_a_mistake_is_one_line_and_no_traceback(tmp_path):
    make_inputs(tmp_path)
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a"}\n')
    run = train(tmp_path, "--output_dir", "model", ranks=1)
    assert run.returncode != 0
    assert run.stderr.count("train.py: error: eval.jsonl:1: the record has keys ['prompt']") == 1
    assert "Traceback" not in run.stdout + run.stderr


def test_deepspeed_without_a_launcher_says_how_to_start(tmp_path):
    make_inputs(tmp_path)
    run = train_alone(tmp_path, "--deepspeed", str(ROOT / "configs/zero2_mofasgd.json"))
    assert run.returncode == 2
    assert "Use `deepspeed launch/train.py" in run.stderr


def test_one_process_trains_and_goes_on_after_sigterm(tmp_path):
    make_inputs(tmp_path)
    output = succeeded(train_alone(tmp_path, "--output_dir", "model"))
    assert "optimizer: MoFaSGD, one process, lr 0.0012" in output
    assert "batch: 2 sequences = 2 each on one process" in output
    first, last = losses_in(output)
    assert last < first - 0.1
    assert answer_loss(tmp_path / "model", tmp_path / "eval.jsonl") == pytest.approx(last, abs=0.006)
    fault = ["--fault", f"sigterm:{STEPS // 2}:0"]
    run = train_alone(tmp_path, "--output_dir", "stopped", *fault, script="tests/launch/faulty.py")
    assert run.returncode == 143, run.stdout[-3000:] + run.stderr[-3000:]
    assert f"stopped by SIGTERM, saved stopped/checkpoint-{STEPS // 2}" in run.stdout
    succeeded(train_alone(tmp_path, "--output_dir", "stopped", "--resume_from_checkpoint", "last"))
    assert_same_model(tmp_path / "model", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("config", [f"zero{stage}_{name}" for name in ("mofasgd", "adamw") for stage in (0, 1, 2, 3)])
def test_every_stage_saves_what_it_trained(tmp_path, finished, config):
    make_inputs(tmp_path)
    rate = [] if "mofasgd" in config else ["--learning_rate", "3e-3"]
    output = succeeded(train(tmp_path, "--output_dir", "model", *rate, config=config))
    first, last = losses_in(output)
    assert last < first - 0.1
    assert answer_loss(tmp_path / "model", tmp_path / "eval.jsonl") == pytest.approx(last, abs=0.006)
    if config in ("zero0_mofasgd", "zero1_mofasgd"):
        # The stages differ in where things lie, not in what is computed. (Stage 3 draws other random weights.)
        ours, reference = (load_file(f / "model/model.safetensors") for f in (tmp_path, finished[0]))
        for name in reference:
            torch.testing.assert_close(ours[name], reference[name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--packing"], ["--gradient_checkpointing"], ["--bf16"]], ids=" ".join)
def test_options_that_change_the_step(tmp_path, options):
    make_inputs(tmp_path)
    output = succeeded(train(tmp_path, "--output_dir", "model", "--train_file", "eval.jsonl", *options))
    first, last = losses_in(output)
    assert last < first - 0.1
    precision = 0.05 if "--bf16" in options else 0.006
    assert answer_loss(tmp_path / "model", tmp_path / "eval.jsonl") == pytest.approx(last, abs=precision)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_fused_head_trains_the_same(tmp_path, finished, stage):
    make_inputs(tmp_path)
    config = json.loads((ROOT / f"configs/zero{stage}_mofasgd.json").read_text())
    config["optimizer"]["params"] |= {"fused_head": True}
    (tmp_path / "fused.json").write_text(json.dumps(config))
    output = succeeded(
        train(tmp_path, "--output_dir", "model", "--save_strategy", "steps", "--deepspeed", "fused.json")
    )
    assert "fused_head does nothing" not in output
    if stage == 3:  # draws other random weights
        assert losses_in(output)[1] < losses_in(output)[0] - 0.1
        return
    histories = (log_history(f / f"model/checkpoint-{STEPS}") for f in (tmp_path, finished[0]))
    for ours, theirs in zip(*histories, strict=True):
        for key in ours.keys() & {"loss", "grad_norm", "num_tokens", "eval_loss"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
        assert "loss" not in ours or "entropy" not in ours, "TRL's own loss was taken"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_saved_model_is_trained_further(tmp_path, finished, stage):
    make_inputs(tmp_path)
    model = str(finished[0] / "model")
    options = ["--model_name_or_path", model, "--output_dir", "model"]
    output = succeeded(train(tmp_path, *options, config=f"zero{stage}_mofasgd"))
    assert losses_in(output)[0] == losses_in(finished[1])[1]  # it starts from the weights that were saved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        ("accelerate_zero2", [], "MoFaSGD, ZeRO stage 2, lr 0.0012"),
        (
            "fsdp2",
            ["--optimizer", "MoFaSGD"],
            "MoFaSGD, FSDP2 (CPU ranks, resharded after forward, checkpoints SHARDED",
        ),
    ],
)
def test_accelerate_launches_it_too(tmp_path, config, words, said):
    make_inputs(tmp_path)
    launcher = ["accelerate", "launch", "--config_file", str(ROOT / f"configs/{config}.yaml")]
    launcher += ["--main_process_port", str(free_port()), str(ROOT / "launch/train.py"), *words]
    output = succeeded(start(tmp_path, launcher, "--output_dir", "model"))
    assert said in output
    # From a saved model: the config has the first rank alone read it.
    launcher[launcher.index("--main_process_port") + 1] = str(free_port())
    more = succeeded(start(tmp_path, launcher, "--output_dir", "more", "--model_name_or_path", "model"))
    assert losses_in(more)[0] == losses_in(output)[1]


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--fsdp"]], ids=["ddp", "fsdp2"])
def test_torchrun_passes_sigterm_on(tmp_path, words):
    make_inputs(tmp_path)
    launcher = ["torchrun", "--standalone", "--nproc_per_node", "2", str(ROOT / "tests/launch/faulty.py")]
    launcher += ["--fault", "sigterm-all:3:0", "--optimizer", "MoFaSGD", *words]
    run = start(tmp_path, launcher, "--output_dir", "model")
    assert run.returncode == 1
    assert "stopped by SIGTERM, saved model/checkpoint-3" in run.stdout
