"""Starts the training command as a user does, with inputs of its own, and reads what it leaves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
LENGTH = 64
STEPS = 6
# One uninterrupted run, with a checkpoint half way.
WITH_A_CHECKPOINT = (
    *("--output_dir", "model", "--save_strategy", "steps", "--save_steps", str(STEPS // 2)),
    *("--report_to", "tensorboard"),
)


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
    launcher = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), str(ROOT / script)]
    return start(folder, [*launcher, "--deepspeed", str(ROOT / f"configs/{config}.json")], *words)


def train_alone(folder: Path, *words: str, script: str = "launch/train.py") -> subprocess.CompletedProcess:
    """The same in one process, without a launcher and without DeepSpeed."""
    return start(folder, [sys.executable, str(ROOT / script), "--optimizer", "MoFaSGD"], *words)


def start(folder: Path, launcher: list[str], *words: str) -> subprocess.CompletedProcess:
    command = [*launcher]
    if "--model_name_or_path" not in words:
        command += ["--model_config", "shape.json"]
    command += ["--train_file", "train.txt", "--eval_file", "eval.jsonl", "--max_length", str(LENGTH)]
    # Five examples to evaluate do not divide by two ranks of two: Accelerate repeats some, and none may count twice.
    command += ["--per_device_eval_batch_size", "2"]
    command += ["--per_device_train_batch_size", "2", "--max_steps", str(STEPS)]
    # From random weights nothing would be seen to happen at the default, which is for fine-tuning.
    command += ["--learning_rate", "1.2e-3", "--logging_steps", "1", "--eval_on_start", *words]
    environment = command_environment(folder)
    environment.pop("RANK", None)  # of a launcher around these tests
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def succeeded(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def log_history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses_in(output: str) -> tuple[float, float]:
    """The first and the last evaluation loss in what a run printed."""
    first, last = re.search(r"eval loss ([\d.]+) before training -> ([\d.]+)", output).groups()
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
