"""What FSDP2 adds to a micro-batch, beside the committed runs on one to four H200s."""

import json
from pathlib import Path

import pytest

from ds_mofa.profiler.setting import RunSetting
from profiling import sharded_cost
from profiling.cost_model import H200, Model

ROOT = Path(__file__).parents[2]
BESIDE_70B = "sharded_llama-3.1-8b_2xH200_2026-11-26.jsonl"
MODELS = {name: Model.read(ROOT / f"configs/models/{name}.json") for name in ("llama-3.1-8b", "llama-3.1-70b")}


def _measured(row: dict) -> bool:
    """Eager, in bf16 or eight bits, and with tokens enough that no host is waited for; those of :data:`BESIDE_70B` had one that
    trained 70B beside them.
    """
    run = row.get("run", "")
    left_out = (
        "compiled=1" in run or "weights=fp32" in run or "offload" in run or row.get("shape", "").startswith("1024x")
    )
    return run.startswith("fsdp2:") and "micro_batch_ms" in row and row["model"] in MODELS and not left_out


ROWS = [
    row
    for path in sorted((ROOT / "profiling/results/benchmarks").glob("*.jsonl"))
    if path.name != BESIDE_70B
    for row in map(json.loads, path.read_text().splitlines())
    if _measured(row)
]


def _setting(row: dict) -> RunSetting:
    return RunSetting.parse(row["run"], shape=row["shape"], gpus=row["gpus"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['gpus']}-{row['model']}-{row['run']}-{row['shape']}")
def test_a_micro_batch_is_within_a_tenth_and_the_speed_within_a_fifth(row):
    model, setting = MODELS[row["model"]], _setting(row)
    seconds = sharded_cost.seconds_of_micro_batch(model, setting, H200, H200)
    assert seconds * 1e3 == pytest.approx(row["micro_batch_ms"], rel=0.1)
    assert sharded_cost.tokens_per_second(model, setting) == pytest.approx(row["tokens_per_second"], rel=0.2)


def test_there_are_rows_of_one_two_and_four_gpus():
    assert len(ROWS) >= 18 and {row["gpus"] for row in ROWS} == {1, 2, 4}
    assert {"AdamW" in row["run"] for row in ROWS} == {True, False}


def test_weights_that_stay_gathered_are_sent_once_a_step():
    parts = {}
    for word in ("", ":reshard=0", ":gathered=1"):
        setting = RunSetting.parse(f"fsdp2:MoFaSGD:r=32{word}", shape="1024x8", gpus=2)
        parts[word] = sharded_cost.sharded_parts(MODELS["llama-3.1-8b"], setting, H200, H200)[-2].sent
    model = MODELS["llama-3.1-8b"]
    weights = 2 * (model.elements + model.adamw) / 2
    assert parts[""] - parts[":reshard=0"] == pytest.approx(weights)
    assert parts[":reshard=0"] - parts[":gathered=1"] == pytest.approx(weights * 7 / 8)


def test_replicas_send_little_between_them():
    """Of the matrices nothing: AdamW's sends their gradients."""
    sent = {}
    for run in ("fsdp2:AdamW:replicas=8", "fsdp2:MoFaSGD:r=32:replicas=8"):
        setting = RunSetting.parse(run, shape="4096x2", gpus=64)
        *_, inside, across = sharded_cost.sharded_parts(MODELS["llama-3.1-8b"], setting, H200, H200)
        sent[setting.optimizer] = across.sent
        assert inside.sent > 0
    model = MODELS["llama-3.1-8b"]
    assert sent["AdamW"] == 2 * 2 * (model.elements + model.adamw) / 8 * 7 / 8
    assert sent["MoFaSGD"] == 2 * 2 * model.adamw / 8 * 7 / 8


def test_the_table_is_what_the_command_prints(capsys):
    sharded_cost.main(["--model_config", str(ROOT / "configs/models/llama-3.1-8b.json")])
    printed = capsys.readouterr().out
    table = (ROOT / "docs/cost_model.md").read_text()
    assert printed.count("\n") == 10
    assert [line for line in printed.splitlines() if line not in table] == []
