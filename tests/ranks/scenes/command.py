"""launch/train.py's main on the ranks of a launch, in the scene's folder, as ``deepspeed launch/train.py`` runs it.

Under any of its engines: the processes are the same, and the words of the command line choose.
"""

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
from transformers.integrations import unset_hf_deepspeed_config

from tests.launch import commands
from tests.launch.commands import LENGTH, ROOT, STEPS


def make_inputs() -> None:
    if dist.get_rank() == 0:
        commands.make_inputs(Path())
    dist.barrier()


# What configs/zero2_mofasgd.json says, but for explore, which turns the last bits of a sum into more than these.
_BY_FLAGS = ["--optimizer", "MoFaSGD", "--rank", "32", "--adam_beta2", "0.95"]
ENGINES = {"zero2": ["--deepspeed", "zero2.json"], "ddp": _BY_FLAGS, "fsdp2": ["--fsdp", *_BY_FLAGS]}


def write_config() -> None:
    if dist.get_rank() == 0:
        content = json.loads((ROOT / "configs/zero2_mofasgd.json").read_text())
        content["optimizer"]["params"]["explore"] = 0
        Path("zero2.json").write_text(json.dumps(content))
    dist.barrier()


def command(*words: str, engine: str = "zero2") -> dict:
    """Run it to its end: what this rank printed, and the code that it ended with; a mistake is raised."""
    from launch.train import main

    write_config()
    given = [*ENGINES[engine], "--model_config", "shape.json", "--use_cpu"]
    given += ["--train_file", "train.txt", "--eval_file", "eval.jsonl", "--max_length", str(LENGTH)]
    # Five examples to evaluate do not divide by two ranks of two: Accelerate repeats some, and none may count twice.
    given += ["--per_device_eval_batch_size", "2", "--per_device_train_batch_size", "2", "--max_steps", str(STEPS)]
    # From random weights nothing would be seen to happen at the default, which is for fine-tuning.
    given += ["--learning_rate", "1.2e-3", "--logging_steps", "1", "--eval_on_start", *words]
    printed, code = io.StringIO(), 0
    try:
        with (
            mock.patch.dict(os.environ),  # Accelerate's settings stay there, for the next engine to find
            contextlib.redirect_stdout(printed),
            mock.patch("launch.train.leave_ranks", dist.barrier),
        ):
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


def finished(engine: str = "zero2") -> dict:
    """One uninterrupted run, with a checkpoint half way."""
    make_inputs()
    run = command(*commands.WITH_A_CHECKPOINT, engine=engine)
    if dist.get_rank() == 0:
        history = json.loads(Path(f"model/checkpoint-{STEPS}/trainer_state.json").read_text())["log_history"]
        run["history"] = [{key: float(value) for key, value in entry.items()} for entry in history]
        run["answer loss"] = commands.answer_loss(Path("model"), Path("eval.jsonl"))
        run["half way"] = saved_model(f"model/checkpoint-{STEPS // 2}")
        run["events"] = len(list(Path("model").glob("runs/*/events.out.tfevents.*")))
    return {**run, "weights": saved_model("model")}
