"""launch/train.py's main on the ranks of a launch, in the scene's folder, as ``deepspeed launch/train.py`` runs it."""

import contextlib
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from deepspeed import comm as dist
from safetensors.torch import load_file
from scenes.huggingface import forget_accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import unset_hf_deepspeed_config

ROOT = Path(__file__).resolve().parents[3]
MODEL = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
LENGTH = 64
STEPS = 6


def make_inputs() -> None:
    """A shape, text to train on, and answers of unequal length, so that a mean over them is none over their tokens."""
    if dist.get_rank() == 0:
        Path("shape.json").write_text(json.dumps(MODEL))
        Path("train.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
        answer = "brown fox jumps over the lazy dog " * 2
        records = [{"prompt": "the quick ", "completion": answer[:n]} for n in (5, 40, 12, 3, 55)]
        Path("eval.jsonl").write_text("\n".join(map(json.dumps, records)))
    dist.barrier()


def command(*words: str) -> dict:
    """Run it to its end: what this rank printed, and the code that it ended with; a mistake is raised."""
    from launch.train import main

    given = ["--deepspeed", str(ROOT / "configs/zero2_mofasgd.json"), "--model_config", "shape.json", "--use_cpu"]
    given += ["--train_file", "train.txt", "--eval_file", "eval.jsonl", "--max_length", str(LENGTH)]
    # Five examples to evaluate do not divide by two ranks of two: Accelerate repeats some, and none may count twice.
    given += ["--per_device_eval_batch_size", "2", "--per_device_train_batch_size", "2", "--max_steps", str(STEPS)]
    given += ["--logging_steps", "1", "--eval_on_start", *words]
    printed, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(printed), mock.patch("launch.train.leave_ranks", dist.barrier):
            main(given)
    except SystemExit as ended:
        code = ended.code
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's way to end this process
        unset_hf_deepspeed_config()
        forget_accelerate()
    dist.barrier()
    return {"output": printed.getvalue(), "code": code}


@contextlib.contextmanager
def sigterm_before(owner: type, name: str, number: int, rank: int) -> Iterator[None]:
    """The rank gets SIGTERM before the ``number``th call of a method."""
    original, calls = getattr(owner, name), []

    def method(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, method):
        yield


def saved_model(folder: str) -> dict[str, torch.Tensor]:
    """Its weights; nothing where it is not finished."""
    path = Path(folder, "model.safetensors")
    return load_file(path) if path.exists() else {}


def answer_loss(folder: str) -> float:
    """Loss per answer token of a saved model, one example at a time: what the run's eval loss should be."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    total, tokens = 0.0, 0
    for record in map(json.loads, Path("eval.jsonl").read_text().splitlines()):
        prompt = tokenizer(record["prompt"])["input_ids"]
        answer = tokenizer(record["completion"])["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])[:, :LENGTH]
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        picked = log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, tokens = total - picked.sum().item(), tokens + len(picked)
    return total / tokens


def finished() -> dict:
    """One uninterrupted run, with a checkpoint half way."""
    make_inputs()
    run = command(
        "--output_dir",
        "model",
        "--save_strategy",
        "steps",
        "--save_steps",
        str(STEPS // 2),
        "--report_to",
        "tensorboard",
    )
    if dist.get_rank() == 0:
        history = json.loads(Path(f"model/checkpoint-{STEPS}/trainer_state.json").read_text())["log_history"]
        run["history"] = [{key: float(value) for key, value in entry.items()} for entry in history]
        run["answer loss"] = answer_loss("model")
        run["events"] = len(list(Path("model").glob("runs/*/events.out.tfevents.*")))
    return {**run, "weights": saved_model("model")}
