"""Predictions of runs with offload against what was measured on one H200, 2026-11-22 (Llama-3.1-8B, r = 16)."""

import dataclasses
from pathlib import Path

import pytest

from ds_mofa.profiler.predict import predict, prediction
from ds_mofa.profiler.setting import RunSetting
from profiling import capacity
from tests.slow_but import slow_but

ROOT = Path(__file__).resolve().parents[3]
LLAMA = str(ROOT / "configs/models/llama-3.1-8b.json")
COMMON = {"rank": 16, "checkpointing": True, "liger": True, "bucket": 20_000_000}
STAGE2 = RunSetting.of(LLAMA, "MoFaSGD", zero=2, offload="optimizer", **COMMON)


@pytest.fixture
def norm_of_a_copy(monkeypatch, whole_to_host):
    """As it was when profiling/results/benchmarks/cards_* were measured."""
    patched(monkeypatch, norm_in_pieces=False, host_at_once=False)


@pytest.fixture
def whole_to_host(monkeypatch):
    """As it was when profiling/results/benchmarks/norm_* were measured."""
    patched(monkeypatch, host_in_pieces=False, host_at_once=False)


@pytest.fixture
def kept_until_backward_ends(monkeypatch):
    """As it was when profiling/results/benchmarks/pieces_* were measured."""
    patched(monkeypatch, host_at_once=False)


def patched(monkeypatch, **flags):
    now = prediction.zero_settings
    monkeypatch.setattr(prediction, "zero_settings", lambda setting: dataclasses.replace(now(setting), **flags))


@pytest.mark.usefixtures("norm_of_a_copy")
@pytest.mark.parametrize(
    ("seq", "micro_batches", "gb"), slow_but(lambda seq, *_: seq == 2048, [(1024, 8, 23.04), (2048, 4, 23.32)])
)
def test_the_gpu_with_an_offloaded_optimizer(seq, micro_batches, gb):
    found = predict(STAGE2.but(seq=seq, micro_batches=micro_batches))
    assert found["allocated"] == pytest.approx(gb * 1e9, rel=0.001)
    # The host's resident set was 25.06 GB; a process without offload has 2.4 GB of that.
    assert found["host"] + 2.44e9 == pytest.approx(25.06e9, rel=0.03)


@pytest.mark.usefixtures("norm_of_a_copy")
@pytest.mark.parametrize(("seq", "micro_batches"), slow_but(lambda seq, _: seq == 2048, [(1024, 8), (2048, 4)]))
def test_the_same_without_offload_and_with_bf16_states(seq, micro_batches):
    setting = RunSetting.of(
        LLAMA, "MoFaSGD", zero=1, seq=seq, micro_batches=micro_batches, states="bf16", contiguous=False, **COMMON
    )
    found = predict(setting)
    assert found["allocated"] == pytest.approx(27.23e9, rel=0.01) and found["host"] == 0


def test_offloaded_weights_leave_the_gpu():
    """Measured: 9.12 GB, when the head's gradient is converted; gathered are head, embedding and the last five layers."""
    found = predict(RunSetting.of(LLAMA, "MoFaSGD", zero=3, offload="param", leaf=True, prefetch=50_000_000, **COMMON))
    assert found["categories"].get("weights", 0) < 0.01e9
    assert found["when"] == "backward, on the way to the host (lm_head.weight)"
    layer = 2 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    gathered = 2 * (2 * 128256 * 4096) + 5 * layer
    assert found["categories"]["communication buffers"] == 2 * COMMON["bucket"] + gathered
    assert found["allocated"] == pytest.approx(9.12e9, rel=0.001)
    assert found["host"] + 2.44e9 == pytest.approx(41.63e9, rel=0.12)


@pytest.mark.usefixtures("whole_to_host")
@pytest.mark.parametrize(("seq", "micro_batches", "gb"), [(1024, 8, 20.94), (2048, 4, 21.22)])
def test_the_gpu_with_the_norm_in_pieces(seq, micro_batches, gb):
    found = predict(STAGE2.but(seq=seq, micro_batches=micro_batches))
    assert found["when"].startswith("backward, on the way to the host")  # the fp32 conversion of the head's gradient
    assert found["allocated"] == pytest.approx(gb * 1e9, rel=0.001)


@pytest.mark.usefixtures("whole_to_host")
@pytest.mark.parametrize(
    ("seq", "micro_batches", "head", "gb"),
    slow_but(
        lambda seq, _, head, gb: (seq, head) == (2048, "matrix"),
        [(1024, 8, "adamw", 20.94), (2048, 4, "adamw", 21.22), (1024, 8, "matrix", 20.69), (2048, 4, "matrix", 20.69)],
    ),
)
def test_the_gpu_with_a_fused_head_and_with_a_head_that_is_a_matrix(seq, micro_batches, head, gb):
    """profiling/results/benchmarks/head_*."""
    setting = STAGE2.but(seq=seq, micro_batches=micro_batches, fused_head=True, head=head)
    assert predict(setting)["allocated"] == pytest.approx(gb * 1e9, rel=0.001)


@pytest.mark.usefixtures("kept_until_backward_ends")
@pytest.mark.parametrize(
    ("seq", "micro_batches", "choice", "gb"),
    slow_but(
        lambda seq, _, choice, gb: seq == 1024 and not choice,
        [
            (1024, 8, {}, 19.75),
            (2048, 4, {}, 19.80),
            (1024, 8, {"head": "matrix"}, 18.73),
            (2048, 4, {"head": "matrix"}, 18.77),
            (2048, 4, {"embed": "frozen"}, 19.17),
        ],
    ),
)
def test_pieces_on_the_way_take_it_further_down(seq, micro_batches, choice, gb):
    """benchmarks/pieces_*: what the host has of the head's gradient is there when the embedding's is copied."""
    found = predict(STAGE2.but(seq=seq, micro_batches=micro_batches, fused_head=True, **choice))
    assert found["categories"]["communication buffers"] == 4 * COMMON["bucket"] + 2 * (1 << 24)
    assert found["allocated"] == pytest.approx(gb * 1e9, rel=0.01)


@pytest.mark.parametrize(("seq", "micro_batches", "gb"), [(1024, 8, 17.90), (2048, 4, 18.18)])
def test_then_one_gradient_is_there_at_a_time(seq, micro_batches, gb):
    found = predict(STAGE2.but(seq=seq, micro_batches=micro_batches))
    assert found["when"] == "backward, straight to the host (lm_head.weight)"
    assert found["categories"]["gradients"] == 2 * 128256 * 4096
    assert found["allocated"] == pytest.approx(gb * 1e9, rel=0.001)


def test_deepspeeds_adamw_sends_them_whole():
    found = predict(STAGE2.but(optimizer="AdamW"))
    assert found["categories"]["communication buffers"] == 4 * COMMON["bucket"] + 2 * 128256 * 4096


def test_adamw_leaves_only_weights_and_what_passes():
    on, off = (
        predict(RunSetting.of(LLAMA, "AdamW", zero=2, gpus=2, offload=how, **COMMON)) for how in (None, "optimizer")
    )
    assert "AdamW states" not in off["categories"] and "master weights" not in off["categories"]
    moved = on["categories"]["AdamW states"] + on["categories"]["master weights"]
    assert off["host"] > moved and off["allocated"] < on["allocated"] - moved


INCLUDED = ("--include", "embed_tokens", "lm_head", "--ways", *capacity.MORE)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), INCLUDED], ids=["first", "eight bits"])
def test_the_table_of_capacities_is_what_the_command_prints(capsys, more):
    capacity.main(["--model_configs", LLAMA, "--optimizers", "MoFaSGD", *more])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 + 5
    table = (ROOT / "docs/memory.md").read_text()
    assert [line for line in printed.splitlines() if line not in table] == []


def test_what_offload_of_the_optimizer_takes_is_shared_out_by_the_ranks():
    """18 bytes a parameter that AdamW trains."""
    few, many = (
        predict(RunSetting.of(LLAMA, "AdamW", zero=3, gpus=gpus, offload="optimizer", **COMMON))["host"]
        for gpus in (8, 64)
    )
    assert few == pytest.approx(18 * 8_030_261_248 / 8, rel=1e-6) and few == pytest.approx(8 * many, rel=1e-6)
