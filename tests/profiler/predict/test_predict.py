"""Predictions against what was measured on H200s (profiling/results/benchmarks), and what cannot be predicted."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ds_mofa.capture import head
from ds_mofa.kernels.cross_entropy import in_blocks
from ds_mofa.profiler.measure.inventory import inventory, sizes
from ds_mofa.profiler.predict import predict, prediction
from ds_mofa.profiler.predict.always import always
from ds_mofa.profiler.predict.prediction import plan_of
from ds_mofa.profiler.predict.step_workspace import step_workspace
from ds_mofa.profiler.predict.zero import zero_settings
from ds_mofa.profiler.setting import RunSetting, SettingError
from profiling import predict as command
from profiling.engine_trainers import make_trainer
from tests.slow_but import slow_but

ROOT = Path(__file__).resolve().parents[3]
LLAMA = str(ROOT / "configs/models/llama-3.1-8b.json")
TINY = str(ROOT / "configs/models/llama-tiny.json")


def measured() -> list[dict]:
    folder = ROOT / "profiling/results/benchmarks"
    paths = [*folder.glob("llama-3.1-8b_*_2026-11-22.jsonl"), *folder.glob("speed_llama-3.1-8b_*_2026-11-22.jsonl")]
    return [json.loads(line) for path in sorted(paths) for line in path.read_text().splitlines()]


def setting_of(row) -> RunSetting:
    setting = RunSetting.parse(row["run"], model_config=LLAMA, shape=row["shape"], gpus=row["gpus"])
    # ds_mofa had no other way when these were measured.
    return setting if setting.entry is None else setting.but(adamw_reduce="micro_batch")


@pytest.fixture
def norm_of_a_copy(monkeypatch):
    """The norm of AdamW's gradients as when profiling/results/benchmarks were measured: of a float64 copy of each."""
    now = prediction.zero_settings
    monkeypatch.setattr(
        prediction, "zero_settings", lambda setting: dataclasses.replace(now(setting), norm_in_pieces=False)
    )


@pytest.mark.slow
def test_70b_on_two_gpus_is_what_was_measured():
    """profiling/results/benchmarks/llama-3.1-70b_*: head and last two layers are gathered at the loss; the embedding is not."""
    found = predict(
        RunSetting.of(
            str(ROOT / "configs/models/llama-3.1-70b.json"), "MoFaSGD", zero=3, gpus=2, seq=2048, rank=8, leaf=True,
            prefetch=500_000_000, bucket=50_000_000, checkpointing=True, liger=True, micro_batches=1,
        )
    )  # fmt: skip
    assert found["allocated"] == pytest.approx(96.72e9, rel=0.001)


def rows_of(*names: str) -> list[dict]:
    """Of these files, but for graphs, whose memory is not predicted."""
    folder = ROOT / "profiling/results/benchmarks"
    paths = sorted(path for name in names for path in folder.glob(f"{name}.jsonl"))
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [row for row in rows if "graphed" not in row["run"]]


def predicted(row: dict) -> dict:
    config = str(ROOT / f"configs/models/{row['model']}.json")
    return predict(RunSetting.parse(row["run"], model_config=config, shape=row["shape"], gpus=row["gpus"]), process=0)


def name_of(row: dict) -> str:
    return f"{row['model']}-{row['run']}-{row['shape']}"


@pytest.mark.slow
@pytest.mark.parametrize("row", rows_of("moe_*", "qwen3.5-9b_*", "int8_*"), ids=name_of)
def test_the_peak_of_the_models_of_today_is_what_was_measured(row, monkeypatch):
    """To 1 %: Qwen3.5's is 0.9 % off, of transformers' own code of its linear attention; the others 0.3 % and less. The fused
    head's softmax was no kernel yet.
    """
    monkeypatch.setattr(head, "cross_entropy", in_blocks)
    assert predicted(row)["allocated"] == pytest.approx(row["peak_allocated_gb"] * 1e9, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    rows_of("sharded_*", "zero_*", "hsdp_*", "offload_llama-3.1-70b_*"),
    ids=lambda row: f"{row['gpus']}-{name_of(row)}",
)
def test_the_peak_of_shards_on_two_and_four_gpus_is_what_was_measured(row):
    near = 0.015 if "fp8" in row["run"] else 0.003
    assert predicted(row)["allocated"] == pytest.approx(row["peak_allocated_gb"] * 1e9, rel=near)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows_of("head-kernel_*"), ids=name_of)
def test_the_peak_with_a_fused_head_is_what_was_measured(row):
    assert predicted(row)["allocated"] == pytest.approx(row["peak_allocated_gb"] * 1e9, rel=0.003)


def of_graphs() -> list:
    """Rows of graphs with whether their process had another shape's before."""
    folder, found = ROOT / "profiling/results/benchmarks", []
    for name in ("captured_*", "shapes_*", "fastest*", "int8-words_*", "replicas_*"):
        for path in sorted(folder.glob(f"{name}.jsonl")):
            seen: set[str] = set()
            for row in map(json.loads, path.read_text().splitlines()):
                if "graphed" in row["run"] and "compiled" not in row["run"]:
                    process = f"{row['model']}-{row['run']}"
                    found.append(pytest.param(row, process in seen, id=f"{row['gpus']}-{name_of(row)}"))
                    seen.add(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("row", "after_another"), of_graphs())
def test_what_graphs_take_is_what_was_measured(row, after_another):
    """By NVML. Graphs of several shapes share most of their memory: the second and later ones' may take more. So did one of
    8192 tokens, checkpointed, with logits of 4.2 GB.
    """
    ratio = row["nvml_gb"] * 1e9 / predicted(row)["total"]
    assert 0.93 < ratio < (1.16 if after_another or row["shape"] == "8192x2" else 1.10)


def test_graphs_take_a_copy_of_the_sketches_and_leave_the_step_its_own_memory():
    found, eager = (predict(RunSetting.of(TINY, "MoFaSGD", graphed=graphed)) for graphed in (True, False))
    setting = RunSetting.of(TINY, "MoFaSGD")
    copy = eager["categories"]["sketches"]
    assert found["allocated"] - eager["allocated"] == copy
    assert found["total"] - eager["total"] == copy + step_workspace(plan_of(setting))
    with_adamw, without = (predict(RunSetting.of(TINY, "AdamW", graphed=graphed)) for graphed in (True, False))
    assert with_adamw["total"] == without["total"]


@pytest.mark.parametrize(("micro_batches", "same"), [(1, False), (2, True)])
def test_gradients_of_graphs_stay(micro_batches, same):
    with_graphs, without = (
        predict(RunSetting.of(TINY, "AdamW", micro_batches=micro_batches, seq=64, graphed=graphed))
        for graphed in (True, False)
    )
    assert (with_graphs["allocated"] == without["allocated"]) == same and with_graphs["allocated"] >= without[
        "allocated"
    ]


def test_graphs_have_the_model_s_own_loss_where_liger_s_cannot_be():
    """liger-kernel's waits for the device."""
    runs = ({"liger": True}, {"liger": True, "graphed": True})
    fused, own = (predict(RunSetting.of(TINY, "AdamW", seq=512, **run)) for run in runs)
    assert own["allocated"] - fused["allocated"] > 2 * 512 * 262  # logits of all tokens


# A prediction of 8B takes half a minute where liger-kernel or a head of many chunks is played through.
QUICK = ("torch:AdamW-4096x2", "torch:MoFaSGD:r=8-1024x8")


def in_every_run(row: dict) -> bool:
    name = f"{row['run']}-{row['shape']}"
    return name in QUICK or row["run"].startswith("zero") and (row["shape"] == "1024x8" or "AdamW" in row["run"])


@pytest.mark.usefixtures("norm_of_a_copy")
@pytest.mark.parametrize("row", slow_but(in_every_run, measured()), ids=lambda row: f"{row['run']}-{row['shape']}")
def test_the_peak_is_what_was_measured(row):
    found = predict(setting_of(row), process=0)  # the one that was measured
    assert found["allocated"] == pytest.approx(row["peak_allocated_gb"] * 1e9, rel=0.001)
    reserved = found["allocated"] + found["categories"].get("allocator slack", 0)
    assert reserved == pytest.approx(row["peak_reserved_gb"] * 1e9, rel=0.10)
    if "nvml_gb" in row:
        assert found["total"] == pytest.approx(row["nvml_gb"] * 1e9, rel=0.10)
    assert sum(found["categories"].values()) == found["total"]


@pytest.mark.usefixtures("norm_of_a_copy")
@pytest.mark.parametrize("row", [row for row in measured() if row["run"].startswith(("zero1", "zero2"))],
                         ids=lambda row: f"{row['run']}-{row['shape']}")  # fmt: skip
def test_what_zero_1_and_2_reserve_is_what_was_measured(row):
    found = predict(setting_of(row), process=0)
    reserved = found["allocated"] + found["categories"]["allocator slack"]
    assert reserved == pytest.approx(row["peak_reserved_gb"] * 1e9, rel=0.005)


# Two H200s, 2026-11-22, ZeRO-2, r = 32, with a reduce-scatter, a norm without copies and no room that
# nothing is copied into: profiling/results/benchmarks/room_*.
# (tokens, micro-batches, liger): GB allocated, reserved, by NVML
SCATTERED = {
    (1024, 8, False): (33.40, 35.43, 38.08),
    (4096, 2, False): (57.98, 59.36, 62.02),
    (4096, 2, True): (44.67, 45.17, 47.81),
}


@pytest.mark.parametrize("shape", SCATTERED)
def test_scattered_gradients_take_what_was_measured(shape):
    seq, micro_batches, liger = shape
    setting = RunSetting.of(
        LLAMA, "MoFaSGD", zero=2, gpus=2, seq=seq, micro_batches=micro_batches, rank=32, liger=liger
    )
    found = predict(setting, process=0)
    reserved = found["allocated"] + found["categories"]["allocator slack"]
    allocated, at_most, nvml = (1e9 * gb for gb in SCATTERED[shape])
    assert found["allocated"] == pytest.approx(allocated, rel=0.001)
    # The first was measured on a slow host, on which gradients wait longer for the stream that reduces them.
    slow = shape == (1024, 8, False)
    assert reserved == pytest.approx(at_most, rel=0.02 if slow else 0.006)
    assert found["total"] == pytest.approx(nvml, rel=0.02 if slow else 0.01)
    # Neither one rank nor gradients that are sent after each micro-batch have anything to scatter.
    assert zero_settings(setting.but(adamw_reduce="micro_batch")).scatters is False


def test_adamw_with_liger_kernel_in_zero_2_is_what_was_measured():
    found = predict(RunSetting.of(LLAMA, "AdamW", zero=2, gpus=2, seq=4096, micro_batches=2, liger=True), process=0)
    assert found["allocated"] == pytest.approx(96.46e9, rel=0.001)
    assert found["total"] == pytest.approx(131.64e9, rel=0.10)


def test_all_points_were_looked_at():
    assert len(measured()) >= 26


def test_the_terms_of_the_papers_setting():
    parts = predict(RunSetting.of(LLAMA, "MoFaSGD"))["categories"]
    assert parts["weights"] == 2 * 8_030_261_248
    head_and_norms = 2 * 128256 * 4096 + 65 * 4096
    assert parts["gradients"] == 2 * head_and_norms and parts["AdamW states"] == 4 * head_and_norms
    # r (m + n + 1) over the seven matrices of 32 layers: 4 bytes of it sketches, 6 factors and working copies
    numbers = 8 * 32 * (2 * 8193 + 2 * 5121 + 3 * 18433)
    assert parts["sketches"] == pytest.approx(4 * numbers, rel=1e-3)
    assert parts["factors"] == pytest.approx(6 * numbers, rel=1e-3)


@pytest.mark.parametrize("offload", [None, "optimizer"])
def test_exploring_widens_all_but_the_state(offload):
    r, k, stage = 8, 5, {"zero": 2, "gpus": 2, "offload": offload}
    without, found = (predict(RunSetting.of(LLAMA, "MoFaSGD", rank=r, explore=count, **stage)) for count in (0, k))
    sides = 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    wider = {name: found["categories"][name] - without["categories"][name] for name in ("sketches", "factors")}
    assert wider["sketches"] == pytest.approx(4 * k * sides, rel=1e-2)
    assert wider["factors"] == pytest.approx((2 + 1 / 4) * k * sides, rel=1e-2)
    assert found["host"] == without["host"]


@pytest.mark.parametrize(
    ("r", "k", "seq", "micro_batches", "gb"),
    slow_but(lambda r, *_: r == 8, [(8, 8, 1024, 8, 30.97), (32, 32, 4096, 2, 56.57)]),
)
def test_exploring_takes_what_was_measured(r, k, seq, micro_batches, gb):
    """profiling/results/benchmarks/explore_*, one H200."""
    found = predict(RunSetting.of(LLAMA, "MoFaSGD", rank=r, explore=k, seq=seq, micro_batches=micro_batches))
    assert found["allocated"] == pytest.approx(gb * 1e9, rel=0.001)


@pytest.mark.parametrize(
    ("choice", "seq", "micro_batches", "gb"),
    slow_but(
        lambda choice, *_: "embed" in choice,
        [
            ({}, 1024, 8, 22.33),
            ({"head": "matrix"}, 2048, 4, 19.69),
            ({"embed": "frozen"}, 1024, 8, 20.21),
        ],
    ),
)
def test_8_bit_moments_take_what_was_measured(choice, seq, micro_batches, gb):
    """profiling/results/benchmarks/eight-bit_*, one H200, nothing on the host."""
    common = {"checkpointing": True, "fused_head": True, "adamw_states": "8bit", "seq": seq}
    found = predict(RunSetting.of(LLAMA, "MoFaSGD", rank=8, micro_batches=micro_batches, **common, **choice))
    assert found["allocated"] == pytest.approx(gb * 1e9, rel=0.01)


def test_8_bit_moments_take_a_byte_a_number_and_the_scales():
    head_and_norms = 2 * 128256 * 4096 + 65 * 4096  # whole blocks all of them
    full, found = (predict(RunSetting.of(LLAMA, "MoFaSGD", adamw_states=states)) for states in ("full", "8bit"))
    assert found["categories"]["AdamW states"] == 2 * head_and_norms * (1 + 4 / 256)
    off = full["categories"]["AdamW states"] - found["categories"]["AdamW states"]
    assert full["allocated"] - found["allocated"] == off
    for stage, gpus in ((1, 1), (2, 2), (3, 4)):
        sharded = predict(RunSetting.of(LLAMA, "MoFaSGD", zero=stage, gpus=gpus, adamw_states="8bit"))["categories"]
        assert sharded["AdamW states"] == pytest.approx(2 * head_and_norms / gpus * (1 + 4 / 256), rel=1e-6)
        assert sharded["master weights"] == 4 * (head_and_norms // gpus)


RUNS = [
    "torch:MoFaSGD:r=4:adamw=8bit",
    "torch:MoFaSGD:r=4:adamw=8bit:head_loss=fused:checkpointing=1",
    "torch:MoFaSGD:r=4:adamw=8bit:head_loss=fused:head=matrix",
    "torch:MoFaSGD:r=4:embed=frozen",
    "torch:MoFaSGD:r=4:explore=3",
    "torch:MoFaSGD:r=4:master_weights=1",
    "torch:GaLore:r=4:refresh_every=1",
    "torch:MoFaSGD:r=4:weights=int8:head=matrix:include=embed_tokens:head_loss=fused",
]


@pytest.mark.parametrize("run", RUNS)
def test_what_a_run_keeps_is_what_was_predicted(run):
    """profiling/throughput.py's runs, on a CPU: bytes of what is always there, counted after two steps."""
    setting = RunSetting.parse(run, model_config=TINY, shape="64x2")
    trainer = make_trainer(setting, torch.device("cpu"))
    ids = torch.randint(0, 300, (1, 64), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        for _ in range(2):
            trainer.accumulate(ids)
        trainer.step()
    counted = sizes(inventory(trainer.model, trainer.optimizer), "cpu")
    predicted = predict(setting)["categories"]
    for kind in ("weights", "master weights", "AdamW states", "sketches", "factors"):
        # Counters of the steps.
        assert counted.get(kind, 0) == pytest.approx(predicted.get(kind, 0), rel=0.005, abs=400), kind


@pytest.mark.parametrize("optimizer", ["LoRA", "Muon", "GaLore"])
def test_the_other_optimizers(optimizer):
    full, found = predict(RunSetting.of(TINY, "AdamW")), predict(RunSetting.of(TINY, optimizer))
    states = found["categories"].get("AdamW states", 0) + found["categories"].get("other optimizer states", 0)
    assert states < full["categories"]["AdamW states"]
    gradients = found["categories"]["gradients"]
    assert gradients < full["categories"]["gradients"] if optimizer == "LoRA" else gradients > 0


def test_checkpointing_takes_activations_off_and_tokens_put_them_on():
    few = [predict(RunSetting.of(TINY, "AdamW", **options))["categories"]["activations"] for options in (
        {"checkpointing": True, "seq": 512}, {"seq": 512}, {"seq": 1024}, {"seq": 512, "micro_batch": 2},
    )]  # fmt: skip
    assert few[0] < 0.5 * few[1] and few[2] == pytest.approx(2 * few[1], rel=0.02)
    assert few[3] == pytest.approx(few[2], rel=0.02)


def test_one_micro_batch_needs_no_gradients_at_the_loss():
    once, often = (predict(RunSetting.of(TINY, "AdamW", micro_batches=n, seq=4096)) for n in (1, 8))
    assert once["allocated"] < often["allocated"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "SGD"}, "'SGD' is unknown: choose one of AdamW"),
        ({"zero": 4}, "backend is 'zero4': give torch, ddp, fsdp2, zero0"),
        ({"gpus": 2}, "several GPUs without ZeRO, FSDP2 or DDP"),
        ({"rank": 0}, "rank is 0"),
        ({"explore": -1}, "explore=-1 must be a whole number >= 0"),
        ({"states": "fp8"}, "give fp32 or bf16"),
        ({"optimizer": "GaLore", "explore": 3}, "unknown option 'explore' of GaLore"),
        ({"adamw_states": "4bit"}, "adamw_states='4bit' must be one of 'full', '8bit'"),
        ({"adamw_states": "8bit", "optimizer": "AdamW"}, "adamw_states: of .*MoFaSGD.*, not of AdamW"),
        ({"adamw_states": "8bit", "zero": 2, "offload": "optimizer"}, "ds_mofa refuses that"),
        ({"fused_head": True, "head": "matrix", "optimizer": "LoRA"}, "fused_head, head: of .*MoFaSGD.*, not of LoRA"),
        ({"embed": "matrix"}, "embed is 'matrix': give trained or frozen"),
        ({"offload": "nvme", "zero": 3}, "offload is 'nvme'"),
        ({"offload": "optimizer"}, "ZeRO stages 1 to 3"),
        ({"offload": "param", "zero": 2}, "needs stage 3"),
        ({"graphed": True, "zero": 2}, "graphed with zero2: a graph is of whole weights without an engine"),
        ({"graphed": True, "compiled": True}, "which activations a compiled layer keeps is inductor's choice"),
        ({"model_config": "missing.json"}, "missing.json: no model shape"),
    ],
)
def test_what_cannot_be_predicted(options, message):
    with pytest.raises(SettingError, match=message):
        predict(RunSetting.of(**{"model_config": TINY, **options}))


def test_the_command(tmp_path, capsys):
    words = ["--model_config", TINY, "--zero", "2", "--gpus", "2", "--optimizer", "MoFaSGD", "AdamW"]
    command.main([*words, "--output", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert "| GB are 1e9 bytes | MoFaSGD | AdamW |" in printed and "| **on the device** |" in printed
    assert " 0.00 " not in printed and "| weights | 3.39 MB | 3.39 MB |" in printed
    assert "offloaded" not in printed  # nothing is
    assert set(json.loads((tmp_path / "out.json").read_text())) == {"MoFaSGD", "AdamW"}


def test_the_command_says_what_is_wrong():
    with pytest.raises(SystemExit, match="ds-mofa predict: error: adamw_states: of .*MoFaSGD.*, not of AdamW"):
        command.main(["--model_config", TINY, "--optimizer", "MoFaSGD", "AdamW", "--adamw_states", "8bit"])
    with pytest.raises(SystemExit, match="several GPUs without ZeRO, FSDP2 or DDP"):
        command.main(["--model_config", TINY, "--gpus", "2"])


@pytest.mark.parametrize("zero", [None, 0, 1, 2, 3])
def test_galore_keeps_its_state_and_sends_sketches_at_every_stage(zero):
    """P, m, v and a counter of each matrix in fp32 with its owner: 4 (r (s + 2 l) + 1) bytes."""
    r, gpus = 4, 1 if zero is None else 2
    plan = plan_of(RunSetting.of(TINY, "GaLore", zero=zero, gpus=gpus, rank=r, seq=32))
    there = always(plan)
    shapes = [p.shape for p in plan.matrices]
    state = sum(r * (min(shape) + 2 * max(shape)) + 1 for shape in shapes)
    largest = max(r * (min(shape) + 2 * max(shape)) + 1 for shape in shapes)
    own = there["factors"] - there["sketches"] // 2  # the working copies are bf16, the sketches fp32
    assert 4 * state / gpus <= own <= 4 * (state / gpus + largest + 128 * len(set(shapes)))
    of_mofasgd = always(plan_of(RunSetting.of(TINY, "MoFaSGD", zero=zero, gpus=gpus, rank=r, seq=32)))
    assert {**there, "factors": 0} == {**of_mofasgd, "factors": 0}
