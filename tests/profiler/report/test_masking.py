"""A report shows the command that made it, and none of its secrets."""

import sys

import pytest
import torch
from torch import nn

import ds_mofa
from ds_mofa.profiler import MemoryProfiler
from ds_mofa.profiler.report.masking import masked

SECRET = "S3CR3T"

LINES = {
    "--hub_token S3CR3T --bf16": "--hub_token *** --bf16",
    "--hub-token=S3CR3T --bf16 true": "--hub-token=*** --bf16 true",
    "--hubToken S3CR3T": "--hubToken ***",
    "--wandb_api_key S3CR3T S3CR3T": "--wandb_api_key *** ***",
    "--aws-secret-access-key=S3CR3T": "--aws-secret-access-key=***",
    "--client_secret S3CR3T --password S3CR3T": "--client_secret *** --password ***",
    "trainer.api_key=S3CR3T": "trainer.api_key=***",
    "--data https://me:S3CR3T@host/file": "--data https://***@host/file",
    "--note hf_abcdefghijklmnopqrstuvwxyz": "--note hf_***",
    # Not secrets, whatever their names hold:
    "--tokens 4096 --ignore_keys id source --tokenizer_name_or_path a/b": None,
    "--num_key_value_heads 8 --include_num_input_tokens_seen all --keyword x": None,
    "torch:MoFaSGD:r=4 --shape 1024x8 --lr=1e-3": None,
}


@pytest.mark.parametrize(("line", "shown"), LINES.items(), ids=LINES)
def test_secrets_are_masked_and_nothing_else(line, shown):
    assert " ".join(masked(line.split())) == (shown or line)


def test_no_file_of_a_report_holds_a_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--hub_token", SECRET, "--run_name", "mine"])
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    optimizer = ds_mofa.MoFaSGD(model, rank=4)
    with MemoryProfiler(model, optimizer, output_dir=tmp_path) as profiler:
        for _ in range(3):
            model(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()
    texts = {file.name: file.read_text(errors="replace") for file in tmp_path.iterdir()}
    assert {"report.json", "report.md", "report.html"} <= texts.keys()
    assert not [name for name, text in texts.items() if SECRET in text]
    assert all("--hub_token" in texts[name] and "mine" in texts[name] for name in ("report.json", "report.md"))
