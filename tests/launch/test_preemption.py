"""SIGTERM, wherever it comes: a checkpoint to go on from, or the whole model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from launch.arguments import TrainingArguments
from launch.preemption import SaveOnSigterm, Stopped
from launch.runs import new_lineage
from launch.tokenizer import byte_tokenizer
from launch.train import train_and_evaluate
from launch.trainer import FineTuner

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def make_trainer(output: Path, **options) -> FineTuner:
    """4 steps over 8 sequences, and 3 batches to evaluate."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sequences = torch.randint(0, 256, (8, 8)).tolist()
    data = Dataset.from_dict({"input_ids": sequences, "labels": sequences})
    defaults = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 4, "bf16": False}
    args = TrainingArguments(output_dir=str(output), use_cpu=True, disable_tqdm=True, **(defaults | options))
    trainer = FineTuner(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=262, **shape)),
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(6)),
        processing_class=byte_tokenizer(),
    )
    trainer.lineage, trainer.preemption = new_lineage(), SaveOnSigterm()
    trainer.add_callback(trainer.preemption)
    return trainer


def sigterm_before(monkeypatch, method: str, number: int) -> list[int]:
    """Have this process get SIGTERM before the ``number``th call of a method of FineTuner; the calls are counted."""
    original, calls = getattr(FineTuner, method), []

    def counting(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FineTuner, method, counting)
    return calls


def run(trainer: FineTuner) -> list[str]:
    """Train; the checkpoints that are there then."""
    train_and_evaluate(trainer, None, trainer.preemption)
    folder = Path(trainer.args.output_dir)
    assert all((checkpoint / "complete.json").is_file() for checkpoint in folder.glob("checkpoint-*"))
    return sorted(checkpoint.name for checkpoint in folder.glob("checkpoint-*"))


def test_in_an_evaluation_the_rest_of_it_is_left_out_and_the_step_saved(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", eval_strategy="steps", eval_steps=2)
    batches = sigterm_before(monkeypatch, "prediction_step", 2)
    assert run(trainer) == ["checkpoint-2"]
    assert trainer.preemption.stopped and batches == [2, 2]  # of three
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_in_the_last_evaluation_the_last_step_is_saved(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out")
    batches = sigterm_before(monkeypatch, "prediction_step", 1)
    assert run(trainer) == ["checkpoint-4"]
    assert trainer.preemption.stopped and batches == [4]


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", eval_on_start=True)
    batches = sigterm_before(monkeypatch, "prediction_step", 1)
    assert run(trainer) == []
    assert trainer.preemption.stopped and not trainer.trained and batches == [0]


def test_in_a_save_no_other_step_is_trained(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", save_strategy="steps", save_steps=1)
    saves = sigterm_before(monkeypatch, "_save_checkpoint", 2)
    assert run(trainer) == ["checkpoint-1", "checkpoint-2"]
    assert trainer.preemption.stopped and saves == [1, 2]


def test_at_an_epoch_s_end_nothing_more_is_done(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", eval_strategy="epoch", save_strategy="epoch")
    sigterm_before(monkeypatch, "training_step", 4)
    saves, evaluations = sigterm_before(monkeypatch, "_save_checkpoint", 0), sigterm_before(monkeypatch, "evaluate", 0)
    assert run(trainer) == ["checkpoint-4"]
    assert trainer.preemption.stopped and saves == [4] and evaluations == []


def test_stopped_it_loads_no_best_model(tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path / "out",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    sigterm_before(monkeypatch, "training_step", 3)
    monkeypatch.setattr("transformers.Trainer._load_best_model", lambda self: pytest.fail("there may not be the time"))
    run(trainer)
    assert trainer.preemption.stopped


def test_a_finished_run_that_is_resumed_trains_no_step_more(tmp_path, monkeypatch):
    """HF would: it asks whether the last step was made only after a step."""
    trainer = make_trainer(tmp_path / "out", max_steps=3, save_strategy="steps", save_steps=3)
    assert run(trainer) == ["checkpoint-3"]
    again = make_trainer(tmp_path / "out", max_steps=3)
    steps = sigterm_before(monkeypatch, "training_step", 0)
    train_and_evaluate(again, str(tmp_path / "out/checkpoint-3"), again.preemption)
    assert again.state.global_step == 3 and steps == [] and not again.trained


def test_the_best_is_not_another_run_s_checkpoint(tmp_path):
    """Best at step 1, which is not saved; an older run in the folder has saved its own step 1."""
    output = tmp_path / "out"
    run(make_trainer(output, save_strategy="steps", save_steps=1, save_total_limit=0))
    mine = make_trainer(
        output,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_runtime_rank",
        greater_is_better=False,
    )
    original = mine.evaluate
    mine.evaluate = lambda *args, **kwargs: original(*args, **kwargs) | {"eval_runtime_rank": mine.state.global_step}
    run(mine)
    assert mine.state.best_metric == 1 and mine.state.best_model_checkpoint is None


CHILD = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from torch import distributed as dist
from transformers import TrainerControl
from launch.preemption import SaveOnSigterm

rank, world = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)
preemption, control = SaveOnSigterm(), TrainerControl()
open(sys.argv[3] + f".ready{{rank}}", "w").close()
if world == 2:
    {two}
else:
    while not preemption._asked:
        time.sleep(0.05)
    preemption.on_step_end(None, None, control)
    print("saves", control.should_save, flush=True)
"""


def start_child(tmp_path: Path, rank: int, world: int, two: str = "pass", before: str = "") -> subprocess.Popen:
    """A rank, as a child of a shell in which ``before`` was run."""
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(root=str(ROOT), two=two))
    line = f"{before} {sys.executable} {script} {rank} {world} {tmp_path}/store2 & echo $!; wait $!"
    return subprocess.Popen(["bash", "-c", line], stdout=subprocess.PIPE, text=True)


def ready(tmp_path: Path, *ranks: int) -> None:
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"store2.ready{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_another_child_of_the_parent_that_has_ended_does_not_matter(tmp_path):
    gone = tmp_path / "gone"
    shell = start_child(tmp_path, 0, 1, before=f"(until [ -e {gone} ]; do sleep 0.1; done) &")
    pid = int(shell.stdout.readline())
    ready(tmp_path, 0)
    gone.touch()
    time.sleep(0.5)  # of the two children of the shell one is left
    os.kill(pid, signal.SIGTERM)
    assert shell.communicate(timeout=60)[0] == "saves True\n" and shell.returncode == 0


def test_a_rank_that_waits_for_a_dead_one_ends_at_once(tmp_path):
    shells = [start_child(tmp_path, rank, 2, two="time.sleep(600)") for rank in (0, 1)]
    pids = [int(shell.stdout.readline()) for shell in shells]
    ready(tmp_path, 0, 1)
    os.kill(pids[0], signal.SIGKILL)
    shells[0].wait(timeout=60)
    os.kill(pids[1], signal.SIGTERM)
    shells[1].communicate(timeout=60)
    assert shells[1].returncode == 143


def test_an_evaluation_goes_on_where_nobody_has_asked():
    preemption = SaveOnSigterm()
    preemption.on_prediction_step(None, None, None)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        preemption.on_prediction_step(None, None, None)
