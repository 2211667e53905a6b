"""HF's Trainer and TRL's SFTTrainer with ``optimizer_cls_and_kwargs``, and no DeepSpeed: one process, DDP, FSDP2."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from comparing import TOLERANCE, equal
from engines import whole
from launching import on_ranks
from reference import Reference
from scenes.accelerating import WRAPPED, in_folder, restored, trainer_of
from scenes.huggingface import VOCABULARY, llama, sentences
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import ds_mofa

STEPS, BATCH = 4, 12
OPTIONS = {"lr": 2e-3, "rank": 4, "weight_decay": 0.1, "adamw_lr": 1e-3, "adamw_eps": 1e-6}
CLIP = 0.5  # below the norm of every step


def lessons(engine: str, world: int = 1, resume: str | None = None, kind: str = "Trainer", **settings: Any) -> dict:
    """Four steps, saved after two.

    Args:
        engine: ``"one"``, ``"ddp"`` or ``"fsdp2"``.
        kind: of trainer; ``"optimizers"`` is the Trainer with an optimizer that the script has built.
        **settings: of TrainingArguments; ``tied`` and ``state_dict_type`` are not its own.
    """
    model, seen = llama(), []
    if settings.pop("tied", False):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.register_forward_pre_hook(lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True)
    arguments = {
        "output_dir": f"{kind}-{engine}",
        "use_cpu": True,
        "per_device_train_batch_size": BATCH // 2 // world,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "lr_scheduler_type": "linear",
        "learning_rate": OPTIONS["lr"],
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
        **(sharding(settings.pop("state_dict_type", "SHARDED_STATE_DICT")) if engine == "fsdp2" else {}),
        **settings,
    }
    with restored(), trainer_of(engine), loading_on_a_cpu():
        hf = trainer(kind, model, arguments)
        hf.train(resume_from_checkpoint=f"{arguments['output_dir']}/checkpoint-{STEPS // 2}" if resume else None)
        optimizer = getattr(hf.optimizer, "optimizer", hf.optimizer)
        entries = [entry for entry in hf.state.log_history if "grad_norm" in entry]
        return {
            "weights": whole(hf.model_wrapped),
            "norms": [float(entry["grad_norm"]) for entry in entries],
            "losses": [float(entry["loss"]) for entry in entries],
            "steps": optimizer.matrices.steps,
            "matrices": len(optimizer.split.matrices),
            "model": type(hf.model_wrapped).__name__,
            "seen": seen,
        }


def sharding(state_dict_type: str) -> dict:
    chosen = {"transformer_layer_cls_to_wrap": [WRAPPED], "version": 2, "state_dict_type": state_dict_type}
    return {"fsdp": True, "fsdp_config": chosen}


def trainer(kind: str, model: LlamaForCausalLM, arguments: dict) -> Trainer:
    chosen = {"optimizer_cls_and_kwargs": (ds_mofa.ForTrainer, OPTIONS)}
    if kind == "optimizers":
        chosen = {"optimizers": (ds_mofa.MoFaSGD(model, **OPTIONS), None)}
    if kind != "SFTTrainer":
        return Trainer(model, TrainingArguments(**arguments), train_dataset=sentences(96), **chosen)
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in sentences(96)])
    return SFTTrainer(
        model,
        SFTConfig(max_length=16, bf16=False, **arguments),
        train_dataset=rows,
        processing_class=tokenizer,
        **chosen,
    )


@contextlib.contextmanager
def loading_on_a_cpu() -> Iterator[None]:
    """Under DDP the Trainer has an optimizer's state loaded to "cpu:0", which torch.load does not know."""
    load = torch.load

    def loaded(*args, **kwargs):
        if str(kwargs.get("map_location")) == "cpu:0":
            kwargs["map_location"] = "cpu"
        return load(*args, **kwargs)

    with mock.patch.object(torch, "load", loaded):
        yield


def run(engine: str, world: int = 2, **settings: Any) -> dict:
    """The four steps; then the last two again, from the checkpoint."""
    whole = lessons(engine, world, **settings)
    return {"whole": whole, "again": lessons(engine, world, resume="yes", **settings)}


run.seconds = 300

FULL = {"state_dict_type": "FULL_STATE_DICT"}
CHECKPOINTING = {"gradient_checkpointing": True}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in one process, this one."""
    return in_folder(tmp_path_factory.mktemp("alone"), functools.partial(lessons, "one"))


@on_ranks(run, {"engine": "ddp"}, {"engine": "fsdp2", **CHECKPOINTING}, {"engine": "fsdp2", **FULL})
def test_it_is_the_run_of_one_process_and_resumes_bit_for_bit(ran, alone):
    assert_same(ran, alone())


def test_one_process_resumes_bit_for_bit(alone):
    whole, again = alone(), alone(resume="yes")
    assert again["steps"] == STEPS and equal(again["weights"], whole["weights"])
    assert again["norms"][-2:] == whole["norms"][-2:]


@on_ranks(run, {"engine": "fsdp2", "kind": "SFTTrainer"})
def test_trl_trains_alike(ran, alone):
    assert_same(ran, alone(kind="SFTTrainer"))


@on_ranks(run, {"engine": "fsdp2", "tied": True})
def test_tied_embeddings(ran, alone):
    assert_same(ran, alone(tied=True))


@on_ranks(run, {"engine": "ddp", "kind": "optimizers"})
def test_an_optimizer_that_the_script_has_built(ran, alone):
    assert_same(ran, alone())


@pytest.mark.slow
@on_ranks(run, {"kind": "SFTTrainer"}, {"tied": True}, CHECKPOINTING, engine=["ddp"])
def test_under_ddp_too(ran, alone):
    assert_same(ran, alone(kind=ran.kind) if hasattr(ran, "kind") else alone(tied=hasattr(ran, "tied")))


def assert_same(ran, wanted: dict) -> None:
    for result in ran.ranks:
        whole, again = result["whole"], result["again"]
        assert whole["steps"] == again["steps"] == STEPS and whole["matrices"] == 14
        assert whole["model"] == {"ddp": "DistributedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}[ran.engine]
        assert whole["weights"].keys() == wanted["weights"].keys()
        far = {name: distance(value, wanted["weights"][name]) for name, value in whole["weights"].items()}
        assert max(far.values()) < TOLERANCE, far
        assert equal(again["weights"], whole["weights"])
    logged, again = ran.ranks[0]["whole"], ran.ranks[0]["again"]
    assert logged["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
    assert again["norms"][-2:] == logged["norms"][-2:]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


class Dense(nn.Module):
    """What the reference trains: one batch in, its loss out."""

    def __init__(self):
        super().__init__()
        self.lm = llama()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm(input_ids=tokens, labels=tokens).loss


def dense(batches: list[Tensor], clip: float) -> Reference:
    model = Dense()
    names = [
        name for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "head" not in name
    ]
    rates = {key: (lambda step, lr=OPTIONS[key]: lr * (1 - (step - 1) / STEPS)) for key in ("lr", "adamw_lr")}
    settings = {"rank": OPTIONS["rank"], "weight_decay": OPTIONS["weight_decay"], "adamw_eps": OPTIONS["adamw_eps"]}
    return Reference(model, names, beta=0.85, clip=clip, **rates, **settings)


@pytest.mark.parametrize("clip, right", [(CLIP, True), (2 * CLIP, False)])
def test_one_process_is_the_dense_reference_and_logs_its_norm(alone, clip, right):
    """Clipped by the Trainer alone; a reference that clips otherwise is far away."""
    got = alone()
    reference = dense(got["seen"], clip)
    norms = []
    for one, other in zip(got["seen"][::2], got["seen"][1::2], strict=True):
        reference.step((torch.cat([one, other]),))
        norms.append(reference.norm)
    wanted = {name.removeprefix("lm."): value for name, value in reference.weights().items()}
    far = max(distance(value, wanted[name]) for name, value in got["weights"].items())
    assert min(norms) > 2 * CLIP
    if right:
        assert far < TOLERANCE and got["norms"] == pytest.approx(norms, rel=1e-5)
    else:
        assert far > 10 * TOLERANCE
