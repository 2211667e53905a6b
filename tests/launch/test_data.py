"""Datasets from files: blocks of text, the cache, and packing that keeps examples apart."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from launch.arguments import DataArguments
from launch.data import load_data
from launch.errors import UserError
from launch.examples import blocks
from launch.models import config_from_shape
from launch.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@given(st.lists(st.lists(st.integers(), max_size=7)), st.integers(1, 5))
def test_blocks_lose_nothing(pieces, length):
    cut = list(blocks(pieces, length))
    assert [token for block in cut for token in block] == [token for piece in pieces for token in piece]
    assert all(len(block) == length for block in cut[:-1])
    assert all(0 < len(block) <= length for block in cut)


def test_texts_are_cut_into_blocks_and_records_are_not(tmp_path):
    text, records = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("abcdefg")
    records.write_text(json.dumps({"text": "abcdefg"}) + "\n" + json.dumps({"prompt": "a", "completion": "b"}))
    train, evaluation = load_data(DataArguments(train_file=[str(text)], eval_file=[str(records)]), TOKENIZER, 4)
    assert train["input_ids"][:] == [[*b"abcd"], [*b"efg", 257]]
    assert evaluation["input_ids"][:] == [[*b"abcdefg", 257], [*b"ab", 257]]
    assert evaluation["labels"][:] == [[*b"abcdefg", 257], [-100, *b"b", 257]]


def test_a_text_needs_a_length(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("abc")
    with pytest.raises(UserError, match="a.txt: .*--max_length"):
        load_data(DataArguments(train_file=[str(text)]), TOKENIZER, None)


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "a.jsonl"
    for answer in ("b", "cc"):
        file.write_text(json.dumps({"prompt": "a", "completion": answer}))
        train, _ = load_data(DataArguments(train_file=[str(file)]), TOKENIZER, 4)
        assert train["input_ids"][:] == [[*f"a{answer}".encode(), 257]]


def test_the_error_of_a_record_reaches_the_user_as_it_is(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(UserError) as raised:
        load_data(DataArguments(train_file=[str(file)]), TOKENIZER, 4)
    assert str(raised.value).startswith(f"{file}:2: the record has keys ['txt']")


def test_datasets_by_name_take_the_same_records(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "id": 1}))
    args = DataArguments(dataset_name=str(folder), ignore_keys=["id"])
    train, evaluation = load_data(args, TOKENIZER, 4)
    assert train[:] == {"input_ids": [[*b"ab", 257]], "labels": [[-100, *b"b", 257]]}
    assert evaluation is None
    with pytest.raises(UserError, match=r"\[train\] row 0: unknown keys \['id'\]"):
        load_data(DataArguments(dataset_name=str(folder)), TOKENIZER, 4)
    args.dataset_eval_split = "validation"
    with pytest.raises(UserError, match="split 'validation' could not be loaded"):
        load_data(args, TOKENIZER, 4)


def test_packed_examples_do_not_see_each_other(tmp_path):
    """The logits of an example packed with others are those of the example alone."""
    file = tmp_path / "a.jsonl"
    texts = ["abcdefgh", "xyz", "12345"]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train, _ = load_data(DataArguments(train_file=[str(file)]), TOKENIZER, 4)
    packed = pack_dataset(train, 32, "bfd")
    assert len(packed) == 1
    batch = DataCollatorForLanguageModeling(TOKENIZER.pad_token_id, padding_free=True)(list(packed))
    torch.manual_seed(0)
    config = config_from_shape("configs/models/llama-tiny.json")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0]
        start = 0
        for length in packed[0]["seq_lengths"]:
            alone = model(input_ids=batch["input_ids"][:, start : start + length], use_cache=False).logits[0]
            torch.testing.assert_close(logits[start : start + length], alone, atol=1e-5, rtol=1e-4)
            # Nor is the first token of one learnt from the last of the one before.
            assert labels[0, start] == -100
            start += length
    assert start == sum(len(text) + 1 for text in texts)
