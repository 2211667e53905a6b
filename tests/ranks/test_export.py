"""Every file that a model leaves by holds every tensor of the live model, tied ones under each of their names."""

import json
from pathlib import Path

import torch
from comparing import equal
from deepspeed import comm as dist
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
from launching import on_ranks
from safetensors.torch import load_file
from scenes.huggingface import config_file, forget_accelerate, llama, sentences
from torch import Tensor, nn
from toys import Toy, batches
from training import config, engine_for, toy, train_step, whole_weights
from transformers import Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

DATA = batches(3)


class Tied(Toy):
    """Whose head is its embedding; it is the matrices that share a weight in every toy."""

    def __init__(self):
        super().__init__()
        self.head.weight = self.embed.weight


def live(model: nn.Module) -> dict[str, Tensor]:
    """Under every name, whole."""
    weights = whole_weights(model)
    names = {id(param): name for name, param in model.named_parameters()}
    return {name: weights[names[id(param)]] for name, param in model.named_parameters(remove_duplicate=False)}


def exported(stage: int, dtype: str, tied: bool, **rest) -> dict:
    """What each of DeepSpeed's exports holds after three steps."""
    zero = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    built = toy(Tied) if tied else toy()
    start = {name: param.detach().clone() for name, param in built.named_parameters()}
    with engine_for(config(stage, dtype=dtype, zero_optimization=zero, **rest), model=built) as engine:
        for batch in DATA:
            train_step(engine, batch)
        engine.save_checkpoint("saved")
        engine.save_16bit_model("half", "model.bin")
        engine.save_16bit_model("trained", "model.bin", exclude_frozen_parameters=True)
        weights = live(engine.module)
    dist.barrier()
    if dist.get_rank():
        return {}
    result = {"live": weights, "start": start}
    for name in ("half", "trained"):
        result[name] = torch.load(f"{name}/model.bin", weights_only=True)
    if stage:
        convert_zero_checkpoint_to_fp32_state_dict("saved", "fp32")
        result["fp32"] = torch.load("fp32/pytorch_model.bin", weights_only=True)
    return result


def without_the_option() -> dict:
    with engine_for(config(3)) as engine:
        return {"written": engine.save_16bit_model("half", "model.bin"), "there": Path("half/model.bin").exists()}


def by_the_trainer(stage: int, bf16: bool) -> dict:
    """What ``launch/train.py`` does at its end: ``trainer.save_model()``."""
    path = Path(config_file(stage))
    settings = json.loads(path.read_text()) | {"bf16": {"enabled": bf16}}
    if stage == 3:
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    path.write_text(json.dumps(settings))
    arguments = TrainingArguments(
        output_dir="trained",
        use_cpu=True,
        deepspeed=str(path),
        bf16=bf16,
        per_device_train_batch_size=3,
        learning_rate=6e-3,
        max_steps=3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    hf = Trainer(model=model, args=arguments, train_dataset=sentences(18))
    try:
        hf.train()
        hf.save_model()
        weights = live(hf.model_wrapped.module)
        hf.model_wrapped.destroy()
    finally:
        unset_hf_deepspeed_config()
        forget_accelerate()
    dist.barrier()
    return {"live": weights, "start": start, "file": load_file("trained/model.safetensors")}


def assert_moved(result: dict, names: list[str]) -> None:
    """Else a stale copy of the start would pass."""
    for name in names:
        assert not torch.equal(
            result["live"][name].float(), result["start"][name].to(result["live"][name].dtype).float()
        )


@on_ranks(exported, stage=[0, 1, 2, 3], dtype=["fp32", "bf16"], tied=[True])
def test_deepspeeds_exports_hold_the_trained_weights(ran):
    assert_exported(ran)


@on_ranks(exported, stage=[3], dtype=["bf16"], tied=[False], options=[{"master_weights": True}])
def test_deepspeeds_exports_hold_the_trained_weights_of_masters(ran):
    assert_exported(ran)


def assert_exported(ran) -> None:
    first = ran.ranks[0]
    weights, frozen = first["live"], "frozen.weight"
    assert_moved(first, Toy.MATRICES)
    assert equal(first["half"], weights)
    assert equal(first["trained"], {name: weight for name, weight in weights.items() if name != frozen})
    if ran.stage:
        assert first["fp32"].keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.equal(first["fp32"][name].to(weight.dtype), weight), name


@on_ranks(without_the_option)
def test_stage_3_writes_no_half_model_unless_told_to_gather(ran):
    for result in ran.ranks:
        assert result == {"written": False, "there": False}


@on_ranks(by_the_trainer, *[{"stage": stage, "bf16": True} for stage in range(4)], {"stage": 3, "bf16": False})
def test_the_trainers_model_is_the_live_one(ran):
    for result in ran.ranks:
        names = [name for name in result["live"] if name.endswith("proj.weight")]
        assert len(names) == 14
        assert_moved(result, names)
        file = {**result["file"]}
        file.setdefault("lm_head.weight", file["model.embed_tokens.weight"])  # tied: transformers writes it once
        assert file.keys() == result["live"].keys()
        for name, weight in result["live"].items():
            assert torch.equal(file[name].float(), weight.float()), name
