"""A cache of tokenized data is used again as long as code, libraries and tokenizer are the same, and no longer."""

import ast
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cache_key
from launch.arguments import DataArguments
from launch.cache_key import SOURCES, combined_key, encoding_key
from launch.data import load_data
from launch.encoding import Encoder
from launch.tokenizer import BYTE_CHAT_TEMPLATE, byte_tokenizer

LAUNCH = Path(cache_key.__file__).parent
EOS = 257


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=["file", "dataset"])
def arguments(request, tmp_path) -> DataArguments:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    if request.param == "file":
        return DataArguments(train_file=[str(folder / "train.jsonl")])
    return DataArguments(dataset_name=str(folder))


def labels(arguments: DataArguments, tokenizer=None) -> list[int]:
    return load_data(arguments, tokenizer or byte_tokenizer(), 4)[0]["labels"][0]


def test_a_second_run_encodes_nothing(arguments, monkeypatch):
    assert labels(arguments) == [-100, *b"b", EOS]
    monkeypatch.setattr(Encoder, "__call__", lambda *args: pytest.fail("encoded again"))
    assert labels(arguments) == [-100, *b"b", EOS]


def test_changed_code_encodes_again(arguments, monkeypatch, tmp_path):
    assert labels(arguments) == [-100, *b"b", EOS]
    whole = Encoder.text_piece
    monkeypatch.setattr(Encoder, "prompt_and_answer", lambda self, *parts: whole(self, "".join(parts), True, True))
    changed = shutil.copytree(LAUNCH, tmp_path / "launch")
    with (changed / "encoding.py").open("a") as code:
        code.write("# what is learned has changed\n")
    monkeypatch.setattr("launch.data.encoding_key", functools.partial(encoding_key, folder=changed))
    assert labels(arguments) == [*b"ab", EOS]


def test_another_tokenizer_encodes_again(arguments):
    assert labels(arguments) == [-100, *b"b", EOS]
    other = byte_tokenizer()
    other.eos_token = "<|pad|>"
    assert labels(arguments, other) == [-100, *b"b", 258]


def test_every_source_and_library_counts(tmp_path, monkeypatch):
    changed = shutil.copytree(LAUNCH, tmp_path / "launch")
    tokenizer = byte_tokenizer()
    keys = {encoding_key(tokenizer)}
    assert encoding_key(tokenizer, changed) in keys
    for name in SOURCES:
        with (changed / f"{name}.py").open("a") as code:
            code.write("#\n")
        keys.add(encoding_key(tokenizer, changed))
    for library in ("transformers", "tokenizers", "trl", "datasets", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setattr(cache_key, "version", lambda name, changed=library: f"{name == changed}")
            keys.add(encoding_key(tokenizer))
    tokenizer.chat_template = BYTE_CHAT_TEMPLATE + " "
    keys.add(encoding_key(tokenizer))
    assert len(keys) == 1 + len(SOURCES) + 5 + 1


def test_no_source_is_left_out():
    """All that the two files import of ours, directly or not; of what follows, the options decide through arguments."""
    seen, left = set(), ["examples", "rows", "data"]
    while left:
        name = left.pop()
        if name in seen or name in ("arguments", "cache_key"):
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((LAUNCH / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("launch."):
                left.append(node.module.removeprefix("launch."))
    assert seen == set(SOURCES)


def test_all_processes_agree(tmp_path):
    """Ranks, and later runs, look for the same key, in whatever order their sets are."""
    code = (
        "from launch.cache_key import encoding_key; from launch.tokenizer import byte_tokenizer;"
        "print(encoding_key(byte_tokenizer()))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join([str(LAUNCH.parent), *sys.path])}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.strip() == encoding_key(byte_tokenizer()), run.stderr


def test_use_of_a_tokenizer_does_not_change_it():
    tokenizer = byte_tokenizer()
    before = encoding_key(tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    Encoder(tokenizer)("text", {"text": "a"}, "here")
    assert encoding_key(tokenizer) == before


def test_parts_are_told_apart():
    assert combined_key("a", "bc") != combined_key("ab", "c")
    assert combined_key(1) != combined_key("1")
