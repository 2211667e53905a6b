"""``--cuda_graphs``: what it needs is asked for, and training is what it is without.

On a CPU nothing is captured; tests/gpu has the graphs themselves.
"""

import types
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ds_mofa
from launch.arguments import TrainingArguments, parse_arguments
from launch.engines import Engine
from launch.errors import UserError
from launch.graphs import check_model, settle_graphs
from launch.runs import new_lineage
from launch.tokenizer import byte_tokenizer
from launch.trainer import FineTuner

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def trained(output: Path, **options):
    """Losses, and the model after four steps of two micro-batches of unequal rows."""
    torch.manual_seed(0)
    rows = [torch.randint(0, 256, (5 + 3 * i,)).tolist() for i in range(16)]
    args = TrainingArguments(
        output_dir=str(output), use_cpu=True, bf16=False, disable_tqdm=True, max_steps=4, logging_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.5, learning_rate=1e-2, **options,
    )  # fmt: skip
    args.engine = Engine.ONE
    if args.cuda_graphs:
        settle_graphs(args, profiled=False)
    trainer = FineTuner(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=262, **SHAPE)),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=byte_tokenizer(),
        optimizer_cls_and_kwargs=(ds_mofa.ForTrainer, {"lr": 1e-2, "rank": 4, "adjust_lr_fn": "adamw"}),
    )
    trainer.lineage = new_lineage()
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return history, trainer.model, trainer


WRAPPED = {"packing": True, "packing_strategy": "wrapped", "max_length": 16}
OPTIONS = {"plain": {}, "checkpointing": {"gradient_checkpointing": True}, "rows of one length": WRAPPED}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_is_what_it_is_without(tmp_path, options):
    expected, model, _ = trained(tmp_path / "without", **options)
    found, graphed, trainer = trained(tmp_path / "with", **options, cuda_graphs=True)
    assert trainer._micro_batch is not None and trainer.data_collator.pad_to_multiple_of == 128
    assert len(found) == 4
    for key in ("loss", "grad_norm", "num_tokens"):
        assert [one[key] for one in found] == pytest.approx([one[key] for one in expected], rel=1e-3), key
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(graphed.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_a_router_s_loss_is_refused(tmp_path, monkeypatch):
    """TRL weighs it outside of the model, and it would be left out."""
    monkeypatch.setattr(
        FineTuner, "aux_loss_enabled", property(lambda self: True, lambda self, value: None), raising=False
    )
    with pytest.raises(UserError, match="router_aux_loss_coef to 0"):
        trained(tmp_path, cuda_graphs=True)


BASE = ["--model_config", "configs/models/llama-tiny.json", "--train_file", "train.txt", "--cuda_graphs"]
NAMED = [*BASE, "--optimizer", "MoFaSGD"]
REFUSED = {
    "an engine": (
        [*BASE, "--deepspeed", "configs/zero2_adamw.json"],
        {"RANK": "0"},
        "leave --deepspeed and --fsdp out",
    ),
    "shards": ([*NAMED, "--fsdp"], {"RANK": "0"}, "leave --deepspeed and --fsdp out"),
    "packed rows": ([*NAMED, "--packing"], {}, "leave --padding_free out, and --packing, or give"),
    "rows without padding": ([*NAMED, "--padding_free"], {}, "leave --padding_free out"),
    "another loss": ([*NAMED, "--loss_type", "dft"], {}, "leave --loss_type"),
    "a profile": ([*NAMED, "--profile_memory"], {}, "no --profile_memory"),
    "several": ([*NAMED, "--packing", "--profile_memory"], {}, "--packing_strategy wrapped; and no --profile_memory"),
}


@pytest.mark.parametrize(("words", "environment", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_captured_is_refused(monkeypatch, words, environment, message):
    monkeypatch.setattr("launch.arguments.TrainingArguments.__post_init__", lambda self: None)
    for name in ("RANK", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        parse_arguments([*words, "--output_dir", "out"])


@pytest.mark.parametrize("where", ["config", "module", "nowhere"])
def test_dropout_with_recomputed_layers_is_refused(where):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, attention_dropout=0.1 * (where == "config"), **SHAPE))
    model.drop = nn.Dropout(0.1 if where == "module" else 0.0)
    args = types.SimpleNamespace(cuda_graphs=True, gradient_checkpointing=True)
    if where == "nowhere":
        check_model(args, model)
        return
    with pytest.raises(UserError, match="attention_dropout" if where == "config" else "nn.Dropout"):
        check_model(args, model)
    check_model(types.SimpleNamespace(cuda_graphs=True, gradient_checkpointing=False), model)
