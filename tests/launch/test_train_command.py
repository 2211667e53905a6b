"""The command as a user starts it: ranks on a CPU, files in, a model folder out."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_mofa.phases import PHASES
from ds_mofa.profiler import load_report
from ds_mofa.profiler.measure.layers import verdict
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
LENGTH = 64
STEPS = 6


def command_environment(folder: Path) -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }


def train(
    folder: Path, *words: str, config: str = "zero2_mofasgd", ranks: int = 2, script: str = "launch/train.py"
) -> subprocess.CompletedProcess:
    """Run `deepspeed launch/train.py` from ``folder``, so from elsewhere than the repository's root."""
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), str(ROOT / script)]
    command += ["--deepspeed", str(ROOT / f"configs/{config}.json")]
    if "--model_name_or_path" not in words:
        command += ["--model_config", "shape.json"]
    command += ["--train_file", "train.txt", "--eval_file", "eval.jsonl", "--max_length", str(LENGTH)]
    # Five examples to evaluate do not divide by two ranks of two: Accelerate repeats some, and none may count twice.
    command += ["--per_device_eval_batch_size", "2"]
    command += ["--per_device_train_batch_size", "2", "--max_steps", str(STEPS)]
    command += ["--logging_steps", "1", "--eval_on_start", *words]
    return subprocess.run(
        command, cwd=folder, env=command_environment(folder), capture_output=True, text=True, timeout=300
    )


def succeeded(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def log_history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses_in(output: str) -> tuple[float, float]:
    """The first and the last evaluation loss in what a run printed."""
    first, last = re.search(r"eval loss ([\d.]+) -> ([\d.]+)", output).groups()
    return float(first), float(last)


def make_inputs(folder: Path) -> None:
    (folder / "shape.json").write_text(json.dumps(MODEL))
    (folder / "train.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    lengths = (5, 40, 12, 3, 55)  # unequal, so that a mean over examples is not a mean over tokens
    records = [{"prompt": "the quick ", "completion": ("brown fox jumps over the lazy dog " * 2)[:n]} for n in lengths]
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, records)))


def answer_loss(model_folder: Path, eval_file: Path) -> float:
    """Loss per answer token of a saved model, one example at a time: what the run's eval loss should be."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    total, tokens = 0.0, 0
    for record in map(json.loads, eval_file.read_text().splitlines()):
        prompt = tokenizer(record["prompt"])["input_ids"]
        answer = tokenizer(record["completion"])["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])[:, :LENGTH]
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        picked = log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, tokens = total - picked.sum().item(), tokens + len(picked)
    return total / tokens


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """One uninterrupted run of two ranks, with a checkpoint half way; (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("run")
    make_inputs(folder)
    output = succeeded(
        train(
            folder,
            "--output_dir",
            "model",
            "--save_strategy",
            "steps",
            "--save_steps",
            str(STEPS // 2),
            "--report_to",
            "tensorboard",
        )  # fmt: skip
    )
    return folder, output


def test_the_model_loads_and_is_the_trained_one(finished):
    folder, output = finished
    assert (folder / "model/model.safetensors").is_file()
    history = log_history(folder / f"model/checkpoint-{STEPS}")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.2
    first, last = losses_in(output)
    assert last < first - 0.1
    assert answer_loss(folder / "model", folder / "eval.jsonl") == pytest.approx(last, abs=0.006)


def test_the_output_tells_the_story(finished):
    folder, output = finished
    assert "shape.json, random weights, 0.1 M parameters, fp32" in output
    assert "MoFaSGD, ZeRO stage 2, lr 0.006 (linear)" in output
    assert "batch: 4 sequences = 2 each on 2 ranks, 1 times" in output
    assert re.search(rf"{STEPS} steps, [\d,]+ tokens/s, peak memory [\d.]+ GB", output)
    assert output.count("model saved in model") == 1  # by one rank
    steps = [entry for entry in log_history(folder / f"model/checkpoint-{STEPS}") if "tokens_per_second" in entry]
    assert len(steps) == STEPS and all(entry["tokens_per_second"] > 0 for entry in steps)
    assert list((folder / "model").glob("runs/*/events.out.tfevents.*"))


def faulty(folder: Path, fault: str, *words: str) -> subprocess.CompletedProcess:
    """A run with a fault in it (see faulty.py), which must end by itself, and with an error."""
    run = train(folder, *words, "--ddp_timeout", "60", "--fault", fault, script="tests/launch/faulty.py")
    assert run.returncode != 0, run.stdout[-3000:]
    return run


def assert_same_model(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.fixture(scope="module")
def stopped(finished) -> tuple[Path, subprocess.CompletedProcess]:
    """The same run, of which one rank gets SIGTERM half way."""
    folder, _ = finished
    return folder, faulty(folder, f"sigterm:{STEPS // 2}:1", "--output_dir", "stopped")


def test_sigterm_to_one_rank_saves_on_all(stopped):
    folder, run = stopped
    assert run.returncode == 143, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count(f"stopped by SIGTERM, saved stopped/checkpoint-{STEPS // 2}. Start the same command") == 1
    assert "--resume_from_checkpoint last" in run.stdout
    assert not (folder / "stopped/model.safetensors").exists()  # nothing that looks like a finished model


def test_a_resumed_run_ends_where_the_uninterrupted_one_did(finished, stopped):
    folder, output = finished
    # Under the memory profiler, which must not change a bit of what is trained.
    options = ["--resume_from_checkpoint", "last", "--profile_memory", "--profile_hz", "50"]
    resumed = succeeded(train(folder, "--output_dir", "stopped", *options))
    assert_same_model(folder / "model", folder / "stopped")
    assert losses_in(resumed) == losses_in(output)
    check_memory_report(folder / "stopped/memory", resumed)


def test_sigterm_in_an_evaluation_saves_on_all(finished):
    """To rank 1, in the first of two batches of the evaluation half way."""
    folder, output = finished
    evaluating = ["--output_dir", "evaluated", "--eval_strategy", "steps", "--eval_steps", str(STEPS // 2)]
    run = faulty(folder, "sigterm-eval:3:1", *evaluating)
    assert run.returncode == 143, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count(f"stopped by SIGTERM, saved evaluated/checkpoint-{STEPS // 2}. Start the same command") == 1
    assert f"step {STEPS // 2}: eval loss" not in run.stdout + run.stderr
    # Resumed with another rate, which is said not to be in force, it ends as if nothing had been.
    resumed = succeeded(train(folder, *evaluating, "--resume_from_checkpoint", "last", "--learning_rate", "1e-3"))
    assert resumed.count("resumed: lr 0.006 of the checkpoint is in force, not 0.001 of the command line") == 1
    assert_same_model(folder / "model", folder / "evaluated")
    assert losses_in(resumed)[1] == losses_in(output)[1]


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


def check_memory_report(folder: Path, output: str) -> None:
    assert "memory report: stopped/memory/report.html" in output
    report = load_report(folder / "report.json")
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    for rank in report["ranks"]:
        counts = {phase["name"]: phase["count"] for phase in rank["phases"]}
        assert counts.keys() == {"between phases", "forward", "backward", *PHASES}
        assert counts["forward"] == counts["backward"] == counts["apply"] == STEPS - STEPS // 2
        holds, text = verdict(rank["layers"])
        assert holds, text
    assert any("rank 0, 1: No CUDA device" in note for note in report["notes"])


def test_nothing_is_left_in_shared_memory(finished):
    # Every name ends in the port and the rank, and the run above used a port of its own.
    port = re.search(r"--master_port=(\d+)", finished[1]).group(1)
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


def test_a_mistake_is_one_line_and_no_traceback(tmp_path):
    make_inputs(tmp_path)
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a"}\n')
    run = train(tmp_path, "--output_dir", "model", ranks=1)
    assert run.returncode != 0
    assert run.stderr.count("train.py: error: eval.jsonl:1: the record has keys ['prompt']") == 1
    assert "Traceback" not in run.stdout + run.stderr


def test_no_step_at_all_is_an_error_and_not_a_model(tmp_path):
    make_inputs(tmp_path)
    batches = ["--dataloader_drop_last", "--per_device_train_batch_size", "1000"]
    run = train(tmp_path, "--output_dir", "model", *batches, ranks=2)
    assert run.returncode != 0
    said = r"train.py: error: --dataloader_drop_last: \d+ training examples .* than one batch, 1000 on each of 2 ranks"
    assert len(re.findall(said, run.stderr)) == 1
    assert "Traceback" not in run.stdout + run.stderr
    assert not (tmp_path / "model/model.safetensors").exists()


def test_without_a_launcher_it_says_how_to_start(tmp_path):
    environment = {key: value for key, value in command_environment(tmp_path).items() if key != "RANK"}
    run = subprocess.run(
        [sys.executable, ROOT / "launch/train.py"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2
    assert "Use `deepspeed launch/train.py" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("config", [f"zero{stage}_{name}" for name in ("mofasgd", "adamw") for stage in (0, 1, 2, 3)])
def test_every_stage_saves_what_it_trained(tmp_path, finished, config):
    make_inputs(tmp_path)
    # Another rate for AdamW, whose default is for fine-tuning: from random weights nothing would be seen to happen.
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
def test_accelerate_launches_it_too(tmp_path):
    make_inputs(tmp_path)
    launcher = ["accelerate", "launch", "--config_file", str(ROOT / "configs/accelerate_zero2.yaml")]
    launcher += ["--main_process_port", str(free_port()), str(ROOT / "launch/train.py")]
    options = ["--model_config", str(tmp_path / "shape.json"), "--train_file", str(tmp_path / "train.txt")]
    options += ["--max_length", "64", "--max_steps", "2", "--output_dir", str(tmp_path / "model")]
    run = subprocess.run(
        launcher + options, cwd=tmp_path, env=command_environment(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert "MoFaSGD, ZeRO stage 2, lr 0.006" in succeeded(run)
    assert (tmp_path / "model/model.safetensors").is_file()
