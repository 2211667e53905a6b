"""Situations that users of other projects have reported, in data and in resumed runs; docs/reported.md is the list."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from launch.encoding import IGNORED, Encoder
from launch.tokenizer import byte_tokenizer
from tests.launch.commands import assert_same_model, log_history, make_inputs, succeeded, train

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
RECORDS = [
    ("prompt", {"prompt": "ab", "completion": "cd"}),
    ("prompt", {"prompt": "ab", "completion": "cdcdcd"}),
    ("chat", {"messages": CHAT}),
]
MARKS = pytest.mark.parametrize("marks", [True, False])


def encoder(marks: bool) -> Encoder:
    tokenizer = byte_tokenizer()
    if not marks:
        for mark in ("{% generation %}", "{% endgeneration %}"):
            tokenizer.chat_template = tokenizer.chat_template.replace(mark, "")
    return Encoder(tokenizer)


@MARKS
def test_the_end_is_learnt_where_the_end_token_pads(marks):
    """llm-course#33, unsloth#416: with pad_token = eos_token the end was masked, and the model never stopped."""
    encode = encoder(marks)
    end = encode.tokenizer.eos_token_id
    encode.tokenizer.pad_token = encode.tokenizer.eos_token
    rows = [encode(shape, record, "here") for shape, record in RECORDS]
    batch = DataCollatorForLanguageModeling(pad_token_id=encode.tokenizer.pad_token_id)(rows)
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        length = len(row["input_ids"])
        assert ids[:length].tolist() == row["input_ids"] and set(ids[length:].tolist()) <= {end}
        assert labels[length - 1] == end and (labels == end).sum() == 1
        assert set(labels[length:].tolist()) <= {IGNORED}


@MARKS
def test_one_start_token_where_the_tokenizer_and_the_template_both_add_it(marks):
    """OpenRLHF#393: a rendered chat, tokenized with special tokens, began with two of them."""
    encode = encoder(marks)
    start = encode.tokenizer.bos_token_id
    encode.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", start)]
    )
    for shape, record in RECORDS:
        ids = encode(shape, record, "here")["input_ids"]
        assert ids[0] == start and ids.count(start) == 1, shape


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_resumed_in_its_second_epoch_goes_on_with_the_data_and_the_dropout_of_that_epoch(tmp_path, stage):
    """accelerate#4071, ms-swift#10050, speculators#1027: the first epoch's order again, another dropout."""
    make_inputs(tmp_path)
    shape = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2)
    tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    (tmp_path / "shape.json").write_text(json.dumps(shape | dropout | tokens))
    (tmp_path / "train.txt").write_text("".join(f"line {i}: the quick brown fox is {i * i}. " for i in range(30)))
    options = ["--max_steps", "-1", "--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "3"]
    options += ["--save_total_limit", "100", "--output_dir", "model"]
    config = f"zero{stage}_mofasgd"
    succeeded(train(tmp_path, *options, config=config))

    def history(step: int) -> dict[int, tuple[float, float]]:
        entries = log_history(tmp_path / f"model/checkpoint-{step}")
        return {entry["step"]: (entry["epoch"], entry["loss"]) for entry in entries if "loss" in entry}

    saved = sorted(int(folder.name.split("-")[1]) for folder in Path(tmp_path / "model").glob("checkpoint-*"))
    last, whole = saved[-1], history(saved[-1])
    middle = next(step for step in saved if 1.1 < whole[step][0] < 1.9)
    shutil.move(tmp_path / "model", tmp_path / "whole")
    shutil.copytree(tmp_path / f"whole/checkpoint-{middle}", tmp_path / f"from/checkpoint-{middle}")
    options += ["--resume_from_checkpoint", f"from/checkpoint-{middle}"]
    succeeded(train(tmp_path, *options, config=config))
    assert history(last) == whole
    assert_same_model(tmp_path / "whole", tmp_path / "model")
