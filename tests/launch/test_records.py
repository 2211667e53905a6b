"""Every way a data file can be wrong gets a message with the file, the line, and what to do."""

import json

import pytest

from launch import records
from launch.errors import UserError
from launch.records import read_records

GOOD = {
    "text": {"text": "abc"},
    "prompt": {"prompt": "a", "completion": "b"},
    "instruction": {"instruction": "a", "output": "b"},
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}


def write(tmp_path, content: bytes | str, name: str = "data.jsonl") -> str:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


@pytest.mark.parametrize("shape", GOOD)
def test_each_shape_is_recognised_by_its_keys(tmp_path, shape):
    path = write(tmp_path, json.dumps(GOOD[shape]) + "\n")
    assert list(read_records(path)) == [(f"{path}:1", shape, GOOD[shape])]


@pytest.mark.parametrize("value", ["", None, "c"])
def test_the_input_of_an_instruction_may_be_empty(tmp_path, value):
    record = GOOD["instruction"] | {"input": value}
    assert [shape for _, shape, _ in read_records(write(tmp_path, json.dumps(record)))] == ["instruction"]


def test_blank_lines_are_skipped_and_still_counted(tmp_path):
    path = write(tmp_path, "\n" + json.dumps(GOOD["text"]) + "\n\n" + json.dumps(GOOD["text"]) + "\n")
    assert [where for where, _, _ in read_records(path)] == [f"{path}:2", f"{path}:4"]


def test_ignored_keys_are_left_out(tmp_path):
    path = write(tmp_path, json.dumps(GOOD["text"] | {"id": 1, "source": "x"}))
    assert [record for _, _, record in read_records(path, ["id", "source"])] == [GOOD["text"]]


def chat(*messages) -> str:
    return json.dumps({"messages": list(messages)})


USER, ANSWER = GOOD["chat"]["messages"]

BAD_LINES = {
    "broken JSON": ('{"text": "a"', "not valid JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
    "not an object": ('["a"]', "must be a JSON object"),
    "no known shape": ('{"question": "a", "answer": "b"}', "fits no known shape"),
    "half of a shape": ('{"prompt": "a"}', "fits no known shape"),
    "two shapes": ('{"text": "a", "prompt": "b", "completion": "c"}', "several shapes"),
    "unknown keys": ('{"text": "a", "id": 3, "lang": "en"}', r"unknown keys \['id', 'lang'\].*--ignore_keys id lang"),
    "text is not a string": ('{"text": 3}', "'text' must be a string"),
    "text is null": ('{"text": null}', "'text' must be a string"),
    "empty text": ('{"text": ""}', "'text' is empty"),
    "empty answer": ('{"prompt": "a", "completion": ""}', "'completion' is empty"),
    "no messages": ('{"messages": []}', "non-empty list"),
    "messages is a string": ('{"messages": "hello"}', "non-empty list"),
    "a message is a string": (chat(USER, "b"), "message 2 must be an object"),
    "a message without a role": (chat(USER, {"content": "b"}), "message 2 must be an object"),
    "unknown role": (chat(USER, {"role": "gpt", "content": "b"}), "message 2 has the role 'gpt'"),
    "no content": (chat(USER, {"role": "assistant"}), "message 2 .assistant. needs a 'content'"),
    "no answer": (chat(USER), "no message has the role 'assistant'"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, message):
    good = json.dumps(GOOD["text"]).encode()
    path = write(tmp_path, b"\n".join([good, line.encode() if isinstance(line, str) else line, good]))
    with pytest.raises(UserError, match=message) as raised:
        list(read_records(path))
    assert str(raised.value).startswith(f"{path}:2: ")


BAD_FILES = {
    "empty .jsonl": ("data.jsonl", b"", "holds no record"),
    "blank .jsonl": ("data.jsonl", b"\n \n", "holds no record"),
    "empty .txt": ("data.txt", b"", "is empty"),
    "blank .txt": ("data.txt", b" \n\n", "is empty"),
    "other ending": ("data.tsv", b"a", "must end in .txt .*, .jsonl .*, .json, .csv, .parquet, not .[.]tsv"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = write(tmp_path, content, name)
    with pytest.raises(UserError, match=message) as raised:
        list(read_records(path))
    assert str(raised.value).startswith(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.txt: no such file"):
        list(read_records(str(tmp_path / "nowhere.txt")))


def test_text_that_is_not_utf8_names_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "TEXT_PIECE", 4)
    # Far enough in that the decoder meets it on a later read than the first.
    path = write(tmp_path, b"abc\n" * 10_000 + b"\xff\n", "data.txt")
    with pytest.raises(UserError, match="not UTF-8") as raised:
        list(read_records(path))
    assert path in str(raised.value)


def test_a_text_comes_whole_in_pieces_that_end_at_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "TEXT_PIECE", 10)
    text = "one\r\ntwo\n\nthree three three\nfour"
    path = write(tmp_path, text, "data.txt")
    pieces = list(read_records(path))
    assert len(pieces) > 2
    assert "".join(record["text"] for _, _, record in pieces) == text
    assert [record["first"] for _, _, record in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [record["last"] for _, _, record in pieces] == [False] * (len(pieces) - 1) + [True]
    for where, _, record in pieces:
        line = int(where.rsplit(":", 1)[1])
        assert text.split("\n")[line - 1].startswith(record["text"].split("\n")[0])
