"""Datasets from files: blocks of text, the cache, and packing that keeps examples apart."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Json, List, Value
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
from launch.rows import without_filled_in
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


CALL_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %};{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}{{ tools | tojson if tools else '' }}"
)


def call(name: str, arguments: object) -> dict:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def tool(name: str, **parameters) -> dict:
    return {"name": name, "parameters": parameters}


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_dataset_s_tool_calls_have_their_own_arguments_alone(tmp_path, format):
    """Arrow gives the objects of a column all keys of the others, with null in them."""
    rows = [
        {"messages": [{"role": "user", "content": "q"}, call("f", {"a": 1})], "tools": [tool("f", a="int")]},
        {
            "messages": [
                {"role": "user", "content": "q"},
                call("g", {"b": {"c": "x"}}),
                {"role": "tool", "content": "r", "name": "g"},
                {"role": "assistant", "content": "no", "weight": 0},
                call("f", {"a": 2}),
            ],
            "tools": [tool("g", b="object"), tool("f", a="int")],
        },
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "w"}], "tools": None},
    ]
    folder = tmp_path / "dataset"
    folder.mkdir()
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
        stored = pq.read_table(folder / "train.parquet").to_pylist()
        assert stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    else:
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CALL_TEMPLATE
    train, _ = load_data(DataArguments(dataset_name=str(folder)), tokenizer, 4)
    texts = [bytes(ids).decode() for ids in train["input_ids"]]
    assert texts == [
        '<user>q<assistant>f({"a": 1});[{"name": "f", "parameters": {"a": "int"}}]',
        '<user>q<assistant>g({"b": {"c": "x"}});<tool>r<assistant>no;<assistant>f({"a": 2});'
        '[{"name": "g", "parameters": {"b": "object"}}, {"name": "f", "parameters": {"a": "int"}}]',
        "<user>q<assistant>w;",
    ]
    learned = [bytes(label for label in labels if label != -100).decode() for labels in train["labels"]]
    assert learned == ['f({"a": 1});', 'g({"b": {"c": "x"}});f({"a": 2});', "w;"]


def test_a_file_s_own_null_is_an_argument(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, call("f", {"a": None})]}))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CALL_TEMPLATE
    train, _ = load_data(DataArguments(train_file=[str(file)]), tokenizer, 4)
    assert bytes(train["input_ids"][0]).decode() == '<user>q<assistant>f({"a": null});'


def test_nulls_are_dropped_where_a_schema_fills_them_in():
    features = Features({"open": Json(), "list": List({"a": Value("int64"), "b": {"c": Value("string")}})})
    row = {"open": {"a": None}, "list": [{"a": None, "b": {"c": None}}, {"a": 3, "b": None}]}
    stored = Dataset.from_list([row], features=features)
    found = {key: without_filled_in(value, stored.features[key]) for key, value in stored[0].items()}
    assert found == {"open": {"a": None}, "list": [{"b": {}}, {"a": 3}]}


def test_a_bad_row_of_a_dataset_is_named(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"messages": [{"role": "user", "content": "q"}, call("f", text)]} for text in ("{}", "{", "{}")]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CALL_TEMPLATE
    with pytest.raises(UserError, match=r"\[train\] row 1: 'arguments' of a tool call: not valid JSON"):
        load_data(DataArguments(dataset_name=str(folder)), tokenizer, 4)


def test_a_dataset_that_cannot_be_read_is_one_line(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=f"{folder}: split 'train' could not be loaded") as raised:
        load_data(DataArguments(dataset_name=str(folder)), TOKENIZER, 4)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_answers_only_is_for_conversations(tmp_path, name):
    file = tmp_path / name
    file.write_text('{"text": "a"}')
    arguments = DataArguments(train_file=[str(file)])
    load_data(arguments, TOKENIZER, 4)
    arguments.answers_only = True  # not what the cache holds
    with pytest.raises(UserError, match=f"{file}:?1?: --assistant_only_loss is for conversations"):
        load_data(arguments, TOKENIZER, 4)
