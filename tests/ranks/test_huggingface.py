"""Hugging Face's Trainer and Accelerate, from a JSON with "type": "MoFaSGD": ``import ds_mofa`` is all it takes."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler
from deepspeed import comm as dist
from launching import cases, on_ranks
from scenes.huggingface import config_file, forget_accelerate, llama, sentences
from training import OPTIONS, mean_over_ranks, whole_weights
from transformers import Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

STEPS = 8
LR, DECAY = 6e-3, 0.05


def trainer(stage: int) -> dict:
    """Eight steps; then the last four again, from the checkpoint of the fourth."""
    whole = train_by_trainer(stage)
    dist.barrier()
    again = train_by_trainer(stage, resume_from_checkpoint="trained/checkpoint-4")
    return {"whole": whole, "again": again}


def train_by_trainer(stage: int, **kwargs) -> dict:
    arguments = TrainingArguments(
        output_dir="trained",
        use_cpu=True,
        deepspeed=config_file(stage, leaf=stage == 3),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=LR,
        weight_decay=DECAY,
        max_steps=STEPS,
        save_steps=4,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    hf = Trainer(model=llama(), args=arguments, train_dataset=sentences(96))
    try:
        hf.train(**kwargs)
        engine = hf.model_wrapped
        groups = [(group["lr"], group["weight_decay"]) for group in engine.basic_optimizer.param_groups]
        losses = {str(entry["step"]): entry["loss"] for entry in hf.state.log_history if "loss" in entry}
        result = {
            "losses": losses,
            "weights": whole_weights(engine.module),
            "decays": [decay for _, decay in groups],
            "matrices": len(engine.basic_optimizer.split.matrices),
        }
        engine.destroy()
        return result
    finally:
        unset_hf_deepspeed_config()
        forget_accelerate()


def accelerated(stage: int) -> dict:
    settings = json.loads(Path(config_file(stage)).read_text())
    settings["optimizer"]["params"] = {**OPTIONS, "lr": "auto", "weight_decay": "auto", "adjust_lr_fn": "adamw"}
    settings |= {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
    try:
        PartialState(cpu=True)  # Accelerator(cpu=True) would do without DeepSpeed
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
        model = llama()
        optimizer = DummyOptim(model.parameters(), lr=LR, weight_decay=DECAY)
        scheduler = DummyScheduler(optimizer, warmup_num_steps=2)
        loader = torch.utils.data.DataLoader(sentences(2 * 3 * STEPS), batch_size=3)
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        losses = []
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(mean_over_ranks(loss.detach().clone()))
        result = {"losses": losses, "weights": whole_weights(model.module)}
        result["lr"] = [group["lr"] for group in model.basic_optimizer.param_groups]
        model.destroy()
        return result
    finally:
        unset_hf_deepspeed_config()
        forget_accelerate()


def near(a: dict, b: dict) -> bool:
    return all(float((a[name] - b[name]).norm()) <= 1e-5 * float(b[name].norm()) for name in b)


@on_ranks(trainer, stage=[2, 3])
def test_the_trainer_learns_and_resumes(ran):
    for result in ran.ranks:
        whole, again = result["whole"], result["again"]
        assert whole["matrices"] == 14
        assert set(whole["decays"]) == {DECAY}  # "auto" is filled in; the Trainer gives DeepSpeed one group
        for name, weight in whole["weights"].items():
            assert torch.equal(weight, again["weights"][name]), name
    losses, after = (ran.ranks[0][run]["losses"] for run in ("whole", "again"))
    assert losses[str(STEPS)] < losses["1"] - 0.3
    assert after[str(STEPS)] == losses[str(STEPS)]


@on_ranks(accelerated, stage=[2, 3])
def test_accelerate_learns(ran):
    for result in ran.ranks:
        assert result["losses"][-1] < result["losses"][0] - 0.3
        assert result["lr"] == pytest.approx([LR] * len(result["lr"]))


@on_ranks(trainer, stage=[3])
def test_the_trainer_agrees_across_stages(ran, of_stage_2):
    assert near(ran.ranks[0]["whole"]["weights"], of_stage_2(trainer).ranks[0]["whole"]["weights"])


@on_ranks(accelerated, stage=[3])
def test_accelerate_agrees_across_stages(ran, of_stage_2):
    assert near(ran.ranks[0]["weights"], of_stage_2(accelerated).ranks[0]["weights"])


@pytest.fixture
def of_stage_2(launcher):
    """The results of the same scene at stage 2."""
    return lambda scene: launcher.result(cases(scene, stage=[2])[0], [])
