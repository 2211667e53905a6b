"""One set of records as .jsonl, .json, .csv and .parquet is one training set; what is wrong in each is said by its place."""

import csv
import io
import json

import pytest
from datasets import Dataset, Features, Json

from launch.errors import UserError
from launch.records import read_records

ALPACA = [
    {"instruction": "Add, please.", "input": "1\n2", "output": 'It is "3", I think'},
    {"instruction": "Greet.", "input": "", "output": "Grüße,\r\nvon mir\u2028hier"},
]


def as_csv(records: list[dict]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, records[0].keys())
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def as_parquet(records: list[dict], path) -> None:
    Dataset.from_list(records).to_parquet(str(path))


def lines(records: list[dict]) -> bytes:
    return "\n".join(map(json.dumps, records)).encode()


def write(tmp_path, name: str, content: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def read(path: str, *ignored: str) -> list[tuple[str, dict]]:
    return [(shape, record) for _, shape, record in read_records(path, ignored)]


FORMS = {
    "list.json": lambda records: json.dumps(records).encode(),
    "pretty.json": lambda records: b"\xef\xbb\xbf" + json.dumps(records, indent=4, ensure_ascii=False).encode(),
    "lines.json": lines,
    "data.csv": as_csv,
    "excel.csv": lambda records: b"\xef\xbb\xbf" + as_csv(records),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_records(tmp_path, name):
    wanted = read(write(tmp_path, "data.jsonl", lines(ALPACA)))
    assert wanted == [("instruction", ALPACA[0]), ("instruction", {k: ALPACA[1][k] for k in ("instruction", "output")})]
    assert read(write(tmp_path, name, FORMS[name](ALPACA))) == wanted


def test_parquet_gives_the_same_records(tmp_path):
    wanted = read(write(tmp_path, "data.jsonl", lines(ALPACA)))
    as_parquet(ALPACA, tmp_path / "data.parquet")
    assert read(str(tmp_path / "data.parquet")) == wanted


CHATS = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a, b", "weight": 0}] * 2},
    {"messages": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "c"}]},
]
CHATS[0]["messages"][-1] = {"role": "assistant", "content": "d"}


def test_chats_lie_in_parquet_and_as_json_text_in_csv(tmp_path):
    wanted = read(write(tmp_path, "data.jsonl", lines(CHATS)))
    assert wanted[0][1]["learnt"] == [False, False, False, True]
    as_parquet(CHATS, tmp_path / "data.parquet")
    assert read(str(tmp_path / "data.parquet")) == wanted
    texts = [{"messages": json.dumps(chat["messages"])} for chat in CHATS]
    assert read(write(tmp_path, "data.csv", as_csv(texts))) == wanted


def test_parquet_s_json_columns_are_read(tmp_path):
    def chat(argument: object) -> dict:
        call = {"function": {"name": "f", "arguments": {"k": argument}}}
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}

    rows = [{"messages": chat(argument)["messages"]} for argument in (1, None, "x")]
    path = tmp_path / "data.parquet"
    Dataset.from_list(rows, features=Features({"messages": Json()})).to_parquet(str(path))
    assert read(str(path)) == read(write(tmp_path, "data.jsonl", lines(rows)))


BAD = {
    "an object": ("a.json", b'{"data": [\n{"text": "a"}]}', r"a.json: one object with the keys \['data'\]"),
    "a number": ("a.json", b"3", "a.json: a .json file is a list of records"),
    "broken": ("a.json", b'[{"text": "a"},\n {"text": }]', r"a.json: not valid JSON .*line 2, column 11"),
    "a bad record": ("a.json", b'[{"text": "a"}, {"txt": "b"}]', r"a.json: record 2: the record has keys \['txt'\]"),
    "a key twice": ("a.json", b'[{"text": "a", "text": "b"}]', "a.json: the key 'text' stands twice"),
    "no record": ("a.json", b"[]", "a.json: the file holds no record"),
    "a bad line": ("a.json", b'{"text": "a"}\n{"text": \n', "a.json:2: not valid JSON"),
    "not UTF-8": ("a.csv", b"text\nab\n\xff\n", "a.csv:3: not UTF-8"),
    "too many cells": ("a.csv", b"text\n\na, b\n", "a.csv:3: 2 cells under 1 names .text.* in double quotes"),
    "an open quote": ("a.csv", b'text\n"ab\n', "a.csv:2: not valid CSV"),
    "a name twice": ("a.csv", b"text,text\na,b\n", "a.csv:1: a name stands twice"),
    "an unknown column": ("a.csv", b"text,id\na,1\n", r"a.csv:2: unknown keys \['id'\].*--ignore_keys id"),
    "a cell of no JSON": ("a.csv", b'messages\n"\n"\n{\n', "a.csv:2: 'messages' must be a non-empty list"),
    "a cell of broken JSON": ("a.csv", b"messages\n{\n", "a.csv:2: 'messages': not valid JSON"),
    "only names": ("a.csv", b"text\n", "a.csv: the file holds no record"),
    "no Parquet": ("a.parquet", b"text", "a.parquet: cannot be read as Parquet"),
    "another ending": ("a.tsv", b"text", "a.tsv: a data file must end in .*.parquet"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_said_by_its_place(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, name, content))


def test_a_bad_row_of_parquet_is_named(tmp_path):
    as_parquet([{"text": "a"}, {"text": ""}], tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: row 1: 'text' is empty"):
        read(str(tmp_path / "a.parquet"))


def test_keys_are_ignored_in_every_form(tmp_path):
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": 2}]
    as_parquet(rows, tmp_path / "a.parquet")
    paths = [write(tmp_path, "a.csv", as_csv(rows)), write(tmp_path, "a.json", json.dumps(rows).encode())]
    for path in [*paths, str(tmp_path / "a.parquet")]:
        assert read(path, "id") == [("text", {"text": "a"}), ("text", {"text": "b"})]


def test_a_cell_may_be_longer_than_python_s_limit(tmp_path):
    text = "a" * 200_000
    assert read(write(tmp_path, "a.csv", as_csv([{"text": text}]))) == [("text", {"text": text})]
