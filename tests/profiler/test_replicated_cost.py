"""Whole models on several GPUs: the cost model beside the committed runs on two and four H200s."""

import json
from pathlib import Path

import pytest

from ds_mofa.profiler.setting import RunSetting
from profiling import replicated_cost
from profiling.cost_model import H200, Model, optimizer_step

ROOT = Path(__file__).parents[2]
EIGHT = Model.read(ROOT / "configs/models/llama-3.1-8b.json")
ROWS = [
    row
    for path in sorted((ROOT / "profiling/results/benchmarks").glob("replicas_*.jsonl"))
    for row in map(json.loads, path.read_text().splitlines())
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['gpus']}-{row['run']}-{row['shape']}")
def test_the_speed_is_within_a_fifth(row):
    setting = RunSetting.parse(row["run"], shape=row["shape"], gpus=row["gpus"])
    speed = replicated_cost.tokens_per_second(EIGHT, setting)
    assert speed == pytest.approx(row["tokens_per_second"], rel=0.2 if setting.option("fp8") else 0.05)


def test_there_are_rows_of_two_and_four_gpus():
    assert len(ROWS) >= 16 and {row["gpus"] for row in ROWS} == {2, 4}
    assert {"AdamW" in row["run"] for row in ROWS} == {True, False}


@pytest.mark.parametrize("gpus", [2, 8])
def test_every_process_updates_all_and_gathers_nothing(gpus):
    """An all-reduce sends each element of the sketches, and of gradients, twice but for a process's own part."""
    alone, setting = (RunSetting.parse("ddp:MoFaSGD:r=32:graphed=1", gpus=count) for count in (1, gpus))
    (reduce, _, update, gather, apply), parts = (optimizer_step(EIGHT, one, H200) for one in (setting, alone))
    away = 2 * (gpus - 1) / gpus
    assert reduce.sent == away * 4 * 32 * EIGHT.sides and gather.sent == gather.seconds == 0
    assert (update.bytes, apply.bytes) == (parts[2].bytes, parts[4].bytes)
    assert replicated_cost.mean_of_gradients(EIGHT, setting, H200).sent == away * 2 * EIGHT.adamw
    assert replicated_cost.mean_of_gradients(EIGHT, alone, H200).seconds == 0


def test_the_tables_are_what_the_command_prints(capsys):
    table = (ROOT / "docs/cost_model.md").read_text()
    for shape in ("1024x8", "4096x2"):
        replicated_cost.main(["--model_config", str(ROOT / "configs/models/llama-3.1-8b.json"), "--shape", shape])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 16
    assert [line for line in printed.splitlines() if line not in table] == []
