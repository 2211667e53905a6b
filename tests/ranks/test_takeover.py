"""One optimizer after another on one model without destroy(), and optimizers that were built outside of the engine."""

import functools
import json
import re
from pathlib import Path
from unittest import mock

import deepspeed
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param
from launching import on_ranks
from scenes.huggingface import forget_accelerate, llama, sentences
from toys import Toy, batches
from training import config, toy, train_step, whole_weights, with_the_toy_s_own
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from ds_mofa import MoFaSGD, OptionError
from ds_mofa.step.claims import LostError

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.1, "eps": 1e-6}}
PAIRS = ["MoFaSGD-MoFaSGD", "MoFaSGD-AdamW", "AdamW-MoFaSGD", "GaLore-MoFaSGD"]


def build(model, stage: int, kind: str, dtype: str = "fp32", **kwargs):
    settings = config(stage, dtype=dtype, micro=3, gradient_clipping=1.0)
    if kind == "AdamW":
        settings["optimizer"] = ADAMW
    elif kind == "GaLore":
        settings["optimizer"] = {"type": "GaLore", "params": {"rank": 4, "torch_adam": True}}
    params = [p for p in model.parameters() if p.requires_grad]
    settings = with_the_toy_s_own(settings, model)
    return deepspeed.initialize(model=model, model_parameters=params, config=settings, **kwargs)[0]


def copied(weights: dict, model):
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(weights[name])
    return model


# ---------------------------------------------------------------------- one after the other


def successors(stage: int, dtype: str, pair: str) -> dict:
    """Two engines on one model, the first as it was left; and the second one on a fresh copy of the model."""
    first, second = pair.split("-")
    data = batches(4)
    model = toy()
    left = build(model, stage, first, dtype)
    for batch in data[:2]:
        train_step(left, batch)
    between = whole_weights(model)
    runs = {}
    for run, of in (("after", model), ("fresh", copied(between, toy()))):
        engine = build(of, stage, second, dtype)
        losses = [train_step(engine, batch) for batch in data[2:]]
        runs[run] = {"losses": losses, "weights": whole_weights(of)}
        engine.destroy()
    left.destroy()
    return {"between": between, **runs}


def both_optimizers(world: int, dtype: str, pair: str, **_) -> bool:
    """Where MoFaSGD and AdamW follow each other, bf16 and one rank are tried as well."""
    return (world, dtype) == (2, "fp32") or (pair in PAIRS[1:3] and (world == 2 or dtype == "fp32"))


@on_ranks(
    successors,
    world=[1, 2],
    stage=[0, 1, 2, 3],
    dtype=["fp32", "bf16"],
    pair=PAIRS,
    keeps=both_optimizers,
    pairwise=True,
)
def test_a_later_engine_trains_as_on_a_fresh_model(ran):
    # In bf16 a norm's weight moves by less than half of its last bit.
    check_successors(ran, Toy.MATRICES if ran.dtype == "bf16" else None)


def check_successors(ran, moved: list[str] | None = None) -> None:
    """``moved``: what the second optimizer must have moved; None for all that is not frozen."""
    for result in ran.ranks:
        assert result["after"]["losses"] == result["fresh"]["losses"]
        for name, weight in result["after"]["weights"].items():
            assert torch.equal(weight, result["fresh"]["weights"][name]), name
            if name in moved if moved is not None else not name.startswith("frozen"):
                assert not torch.equal(weight, result["between"][name]), name


def left_behind(stage: int) -> dict:
    """An engine that another has followed is stepped, and destroyed later than the other one was built."""
    model = toy()
    first = build(model, stage, "MoFaSGD")
    train_step(first, batches(1)[0])
    second = build(model, stage, "MoFaSGD")
    messages = []
    for step in (first.step, first.optimizer.step):
        with pytest.raises(LostError) as refused:
            step()
        messages.append(str(refused.value))
    first.destroy()
    before = whole_weights(model)
    train_step(second, batches(2)[1])
    second.save_checkpoint("second", tag="t")
    after = whole_weights(model)
    marked = [name for name, param in model.named_parameters() if hasattr(param, "ds_mofa_matrix")]
    seen = {name: safe_get_full_fp32_param(param) for name, param in model.named_parameters() if stage}
    third = build(copied(before, toy()), stage, "MoFaSGD")
    third.load_checkpoint("second", tag="t", load_optimizer_states=False)
    loaded = whole_weights(third.module)
    second.destroy(), third.destroy()
    return {"messages": messages, "marked": marked, "after": after, "loaded": loaded, "seen": seen}


@on_ranks(left_behind, stage=[0, 1, 2, 3])
def test_the_earlier_engine_is_told_and_takes_nothing_with_it(ran):
    for result in ran.ranks:
        assert all("trains nothing any more: " in message for message in result["messages"])
        assert result["marked"] == Toy.MATRICES
        for name, weight in result["after"].items():
            assert torch.equal(result["loaded"][name], weight), name
            assert ran.stage == 0 or name.startswith("frozen") or torch.equal(result["seen"][name], weight), name


def plain_afterwards(stage: int, first: str) -> dict:
    """A plain loop on a model that an engine has had."""
    model, data = toy(), batches(3)
    engine = build(model, stage, first)
    train_step(engine, data[0])
    between = whole_weights(model)
    weights = []
    for of in (model, copied(between, toy())):
        optimizer = MoFaSGD(of, lr=2e-3, rank=4)
        for batch in data[1:]:
            of(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(whole_weights(of))
    return {"between": between, "after": weights[0], "fresh": weights[1]}


@on_ranks(plain_afterwards, world=[1], stage=[0, 1, 2], first=["MoFaSGD", "AdamW"])
def test_a_plain_optimizer_after_an_engine(ran):
    for result in ran.ranks:
        for name, weight in result["after"].items():
            assert torch.equal(weight, result["fresh"][name]), name
            assert name.startswith("frozen") or not torch.equal(weight, result["between"][name]), name


def apart(stage: int) -> dict:
    """Two engines that live at a time, over different parameters."""
    models = toy(), toy(seed=1)
    engines = [build(model, stage, kind) for model, kind in zip(models, ("MoFaSGD", "AdamW"))]
    before = [whole_weights(model) for model in models]
    for engine in engines:
        train_step(engine, batches(1)[0])
    moved = [
        [name for name, weight in whole_weights(model).items() if not torch.equal(weight, weights[name])]
        for model, weights in zip(models, before)
    ]
    for engine in engines:
        engine.destroy()
    return {"moved": moved}


@on_ranks(apart, stage=[2, 3])
def test_engines_of_different_models_leave_each_other_alone(ran):
    trained = [name for name, param in toy().named_parameters() if param.requires_grad]
    assert all(result["moved"] == [trained, trained] for result in ran.ranks)


# ---------------------------------------------------------------------- Hugging Face's Trainer, one after the other


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32)
    drops = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, tie_word_embeddings=False))


def phase(model, stage: int, kind: str, optimizers=(None, None), named: bool = True, **settings) -> list[float]:
    """What one of a user's scripts does, which knows of no engine; the losses."""
    params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    optimizer = {"type": kind, "params": {**params, **({} if kind == "AdamW" else {"rank": 4})}}
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        **({"optimizer": optimizer} if named else {}),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 40, **settings},
    }
    path = Path(f"rank{dist.get_rank()}.json")
    path.write_text(json.dumps(settings))
    try:
        arguments = TrainingArguments(
            output_dir="trained",
            use_cpu=True,
            deepspeed=str(path),
            per_device_train_batch_size=3,
            learning_rate=2e-3,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        hf = Trainer(model=model, args=arguments, train_dataset=sentences(96), optimizers=optimizers)
        hf.train()
        return [entry["loss"] for entry in hf.state.log_history if "loss" in entry]
    finally:
        unset_hf_deepspeed_config()
        forget_accelerate()


def trainers(stage: int, architecture: str, pair: str) -> dict:
    make = {"llama": llama, "gpt2": gpt2}[architecture]
    first, second = pair.split("-")
    model = make()
    phase(model, stage, first)
    between = whole_weights(model)
    losses = phase(model, stage, second)
    after = whole_weights(model)
    fresh = copied(between, make())
    return {
        "between": between,
        "after": {"losses": losses, "weights": after},
        "fresh": {"losses": phase(fresh, stage, second), "weights": whole_weights(fresh)},
    }


def sharded_llama(stage: int, architecture: str, pair: str, **_) -> bool:
    """A model of linears is tried where gradients or weights are in shards."""
    return architecture == "gpt2" or (stage >= 2 and pair in PAIRS[:2])


@on_ranks(
    trainers,
    stage=[0, 1, 2, 3],
    architecture=["gpt2", "llama"],
    pair=PAIRS[:3],
    keeps=sharded_llama,
    pairwise=True,
)
def test_a_later_trainer_trains_as_on_a_fresh_model(ran):
    check_successors(ran)


# ---------------------------------------------------------------------- built outside of the engine


def before_the_ranks(model, **options) -> MoFaSGD:
    """Built when no process group was there yet, which is what refuses it else on several ranks."""
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        return MoFaSGD(model, **options)


OPTIONS = {"lr": 2e-3, "rank": 4, "exclude": ["down"], "adamw_betas": (0.9, 0.95)}
SECTION = (
    '"optimizer": {"type": "MoFaSGD", "params": '
    '{"lr": 0.002, "rank": 4, "exclude": ["down"], "adamw_betas": [0.9, 0.95]}}'
)


def hand_over(stage: int, door: str) -> dict:
    model = toy()
    settings = config(stage, zero_allow_untested_optimizer=True)
    if door != "both":
        del settings["optimizer"]
    if door == "object":
        handed = before_the_ranks(model, **OPTIONS)
    elif door == "factory":
        handed = lambda params: before_the_ranks(model, **OPTIONS)  # noqa: E731
    elif door == "class":
        handed = MoFaSGD
    elif door == "partial":
        handed = functools.partial(MoFaSGD, model=model)
    else:
        handed = torch.optim.AdamW(model.parameters())
    before = whole_weights(model)
    with pytest.raises(OptionError) as refused:
        deepspeed.initialize(model=model, optimizer=handed, config=settings)
    same = all(torch.equal(weight, before[name]) for name, weight in whole_weights(model).items())
    return {"message": str(refused.value), "same": same}


@on_ranks(hand_over, {"stage": 0, "door": "class"}, {"stage": 1, "door": "partial"}, {"stage": 2, "door": "both"},
          *({"stage": stage, "door": door} for stage in range(4) for door in ("object", "factory")))  # fmt: skip
def test_deepspeed_initialize_takes_no_client_optimizer(ran):
    wanted = {
        "object": re.escape(SECTION),
        "factory": re.escape(SECTION),
        "class": re.escape('write "optimizer": {"type": "MoFaSGD", "params": {...}}'),
        "partial": re.escape('write "optimizer": {"type": "MoFaSGD", "params": {...}}'),
        "both": r'says "type": "MoFaSGD".* given an optimizer as well \(AdamW\).* leave one of them out',
    }[ran.door]
    for result in ran.ranks:
        assert re.search(wanted, result["message"]), result["message"]
        assert result["same"]


def trainer_door(stage: int, named: str | None) -> dict:
    """``Trainer(optimizers=...)``, which drops it; with the same, another or no optimizer in the JSON."""
    model = llama()
    with pytest.raises(OptionError) as refused:
        phase(model, stage, named, (before_the_ranks(model, lr=2e-3, rank=2), None), named=named is not None)
    message = str(refused.value)
    phase(model, stage, named, named=named is not None)  # once
    return {"message": message}


@on_ranks(trainer_door, {"stage": 0, "named": None}, {"stage": 1, "named": "AdamW"}, {"stage": 2, "named": "MoFaSGD"},
          {"stage": 3, "named": None}, world=[1, 2])  # fmt: skip
def test_the_trainer_does_not_drop_an_optimizer_unsaid(ran):
    section = '"optimizer": {"type": "MoFaSGD", "params": {"lr": 0.002, "rank": 2}}'
    for result in ran.ranks:
        assert section in result["message"] and "has not stepped" in result["message"]


def accelerate_door(stage: int, offload: bool) -> dict:
    settings = config(stage, train_micro_batch_size_per_gpu=3)
    del settings["optimizer"]
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    try:
        PartialState(cpu=True)
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
        model = toy()
        with pytest.raises(OptionError) as refused:
            accelerator.prepare(model, before_the_ranks(model, **OPTIONS))
        return {"message": str(refused.value)}
    finally:
        unset_hf_deepspeed_config()
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@on_ranks(accelerate_door, {"stage": 0, "offload": False}, {"stage": 2, "offload": True},
          {"stage": 3, "offload": False})  # fmt: skip
def test_accelerate_prepare_takes_no_optimizer_object(ran):
    for result in ran.ranks:
        assert SECTION in result["message"], result["message"]
