"""The cost model beside the committed benchmarks, and its counts beside what is counted elsewhere."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from ds_mofa.partition.layout import Layout
from ds_mofa.profiler.setting import RunSetting

ROOT = Path(__file__).parents[2]
cost = runpy.run_path(str(ROOT / "profiling/cost_model.py"))
NAMES = ("llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b")
MODELS = {name: cost["Model"].read(ROOT / f"configs/models/{name}.json") for name in NAMES}
EIGHT = MODELS["llama-3.1-8b"]


def _rows(*names):
    return [
        row
        for name in names
        for path in sorted((ROOT / "profiling/results/benchmarks").glob(f"{name}.jsonl"))
        for row in map(json.loads, path.read_text().splitlines())
        if ":LoRA:" not in row["run"]
    ]


ROWS = _rows(
    "speed_llama-3.1-8b_*", "once_*", "scatter_*", "strips_*", "ranks_*", "room_*", "llama-3.2-1b_*", "graphed_*"
)
CAPTURED = _rows("captured_*")  # norm and update are graphs too
OTHERS = _rows(
    "shapes_*", "fastest*_*", "head-kernel_*", "int8_llama-3.1-8b_*", "int8-words_*", "alone_*", "together_*_1xH200_*"
)  # the host was waited for in their steps


def _setting(row):
    return RunSetting.parse(row["run"], shape=row["shape"], gpus=row["gpus"])


def _step_ms(row, captured=False):
    parts = cost["optimizer_step"](MODELS[row["model"]], _setting(row), cost["H200"], captured)
    return cost["total"](parts) * 1e3


EXPLORING = _rows("explore_llama-3.1-8b_*")
STEPS = [row for row in ROWS if "MoFaSGD" in row["run"]]
HOST_BOUND = [row for row in STEPS if row["model"] == "llama-3.2-1b"]


@pytest.mark.parametrize(
    "row",
    [row for row in STEPS if row not in HOST_BOUND],
    ids=lambda row: f"{row['run']}-{row['shape']}",
)
def test_the_optimizer_step_is_within_a_fifth(row):
    assert _step_ms(row) == pytest.approx(row["step_ms"], rel=0.2)


@pytest.mark.parametrize(
    "row",
    [row for row in CAPTURED if "MoFaSGD" in row["run"]],
    ids=lambda row: f"{row['model']}-{row['run']}-{row['shape']}",
)
def test_so_is_one_whose_norm_and_update_are_graphs(row):
    assert _step_ms(row, captured=True) == pytest.approx(row["step_ms"], rel=0.2)


def test_a_step_that_waits_for_the_host_is_that_of_a_fast_host():
    """Tokens do not matter to a step, the host does: four runs of one setting on two machines took 16.6 to 33.5 ms."""
    fastest = min(HOST_BOUND, key=lambda row: row["step_ms"])
    assert _step_ms(fastest) == pytest.approx(fastest["step_ms"], rel=0.2)


@pytest.mark.parametrize("run", sorted({row["run"] for row in EXPLORING}))
def test_so_is_the_faster_step_of_a_host_that_did_other_things_beside(run):
    """It compiled: of two steps of one setting, tokens being no matter, the other took 10 to 23 % longer."""
    fastest = min((row for row in EXPLORING if row["run"] == run), key=lambda row: row["step_ms"])
    assert _step_ms(fastest) == pytest.approx(fastest["step_ms"], rel=0.2)


@pytest.mark.parametrize(
    "row",
    [row for row in [*ROWS, *EXPLORING, *CAPTURED, *OTHERS] if row["gpus"] == 1],
    ids=lambda row: f"{row['model']}-{row['run']}-{row['shape']}",
)
def test_the_kernels_of_a_micro_batch_are_within_a_fifth(row):
    parts = cost["micro_batch"](MODELS[row["model"]], _setting(row), cost["H200"])
    assert cost["total"](parts) * 1e3 == pytest.approx(row["micro_batch_gpu_ms"], rel=0.2)


def test_there_are_rows_to_compare_with():
    assert len(STEPS) >= 24 and {_setting(row).rank for row in STEPS} == {8, 16, 32, 64, 128}


@pytest.mark.parametrize("gpus", [2, 3])
def test_what_is_sent_is_what_the_buffers_hold(gpus):
    rank = 32
    layout = Layout([(shape, 0) for shape in EIGHT.matrices], rank, gpus)
    reduce, _, _, gather, _ = cost["optimizer_step"](EIGHT, RunSetting.of(rank=rank, gpus=gpus, zero=2), cost["H200"])
    sent = torch.float32.itemsize * layout.segment * (gpus - 1)  # a reduce-scatter's, and an all-gather's
    assert reduce.sent == pytest.approx(sent, rel=0.02)
    assert gather.sent == pytest.approx(sent / 2, rel=0.02)


@pytest.mark.parametrize("gpus", [1, 2])
def test_exploring_sends_its_columns_and_costs_what_the_columns_do(gpus):
    rank, k = 8, 8
    stage = None if gpus == 1 else 2
    setting = RunSetting.of(rank=rank, gpus=gpus, zero=stage)
    without, found = (cost["optimizer_step"](EIGHT, setting.but(explore=count), cost["H200"]) for count in (0, k))
    wide = Layout([(shape, 0) for shape in EIGHT.matrices], rank + k, gpus)
    assert found[0].sent == pytest.approx(4 * wide.segment * (gpus - 1), rel=0.02)
    assert found[3].sent == pytest.approx(2 * wide.segment * (gpus - 1), rel=0.02)
    for before, after in zip(without, found):
        assert after.seconds >= before.seconds and after.messages == before.messages
    assert found[4].flops == (rank + 2 * k) / rank * without[4].flops
    assert cost["total"](without) < cost["total"](found) < 2 * cost["total"](without)


def test_shapes_are_the_models():
    assert len(EIGHT.matrices) == 224
    assert EIGHT.elements + EIGHT.adamw == 8_030_261_248
    small = cost["Model"].read(ROOT / "configs/models/llama-3.2-1b.json")
    assert small.elements + small.adamw == 1_235_814_400  # embedding and head are one
