"""A run as it is written: every way gives one setting, the string gives it back, and what cannot be is refused."""

import argparse
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from ds_mofa.optimizers.registry import OPTIMIZERS
from ds_mofa.profiler.setting import BACKENDS, RunSetting, SettingError, known_optimizers

ROOT = Path(__file__).resolve().parents[2]
RUNS = [
    "torch:AdamW",
    "torch:LoRA:r=4",
    "zero2:MoFaSGD:r=32",
    "zero2:GaLore:r=8:refresh_every=50:betas=0.9,0.99",
    "zero3:MoFaSGD:r=8:leaf=1:prefetch=500000000:bucket=50000000",
    "torch:MoFaSGD:r=8:head_loss=fused:adamw=8bit:explore=4:head=matrix:embed=frozen:checkpointing=1:card=24",
    "zero1:AdamW:states=bf16:contiguous=0:overlap=0",
    "fsdp2:AdamW:weights=fp32:reshard=0:replicas=2:compiled=1",
    "fsdp2:AdamW:gathered=1",
    "fsdp2:MoFaSGD:r=32:offload=param",
    "ddp:MoFaSGD:r=8",
    "torch:MoFaSGD:r=8:fp8=1:graphed=1",
]


@pytest.mark.parametrize("run", RUNS)
def test_it_is_written_as_it_was_read(run):
    setting = RunSetting.parse(run, gpus=2 if "replicas" in run else 1)
    assert setting.run == run
    whole = RunSetting.parse(run, model_config="a:model=/b.json", shape="64x3", gpus=1 if run[0] == "t" else 4)
    assert RunSetting.parse(str(whole)) == whole != setting
    assert whole.but(shape=setting.shape, gpus=setting.gpus, model_config="") == setting


def test_every_run_that_was_measured_is_read():
    rows = [json.loads(line) for path in ROOT.glob("*/**/*_2026-*.jsonl") for line in path.read_text().splitlines()]
    runs = {row["run"] for row in rows if str(row.get("run", "")).startswith(("torch:", "zero"))}
    assert len(runs) > 30
    for run in runs:  # written since in one order of the words
        assert sorted(RunSetting.parse(run).run.split(":")) == sorted(run.split(":"))


def test_a_default_is_not_written_and_a_rank_always_is():
    alike = RunSetting.parse("torch:mofasgd:bucket=100000000:explore=0:capture=linear")
    assert alike == RunSetting.of() and alike.run == "torch:MoFaSGD:r=8"


def test_a_stage_is_short_for_a_backend():
    assert RunSetting.of(zero=2) == RunSetting.of(backend="zero2") == RunSetting.of(backend="torch").but(zero=2)
    assert RunSetting.of(backend="zero2").but(zero=None) == RunSetting.of(zero="none") == RunSetting.of()
    stages = {name: RunSetting.of(backend=name, gpus=1).zero for name in BACKENDS}
    assert list(stages.values()) == [None, None, None, 0, 1, 2, 3]
    with pytest.raises(SettingError, match="the backend is 'fsdp2' and zero is 3: give one of them"):
        RunSetting.of(backend="fsdp2", zero=3)


def test_what_a_rank_of_fsdp2_holds():
    plain, hybrid = (RunSetting.of(backend="fsdp2", gpus=8, replicas=n) for n in (1, 2))
    assert (plain.shards, hybrid.shards) == (8, 4)
    assert RunSetting.of(zero=3, gpus=8).shards == 8 and RunSetting.of(backend="ddp", gpus=8).shards == 1


@given(
    optimizer=some.sampled_from(known_optimizers()),
    backend=some.sampled_from(["zero1", "zero2", "zero3"]),
    gpus=some.integers(1, 64),
    rank=some.integers(1, 300),
    seq=some.integers(1, 10**5),
    card=some.none() | some.floats(0.5, 200),
    states=some.sampled_from(["fp32", "bf16"]),
    flags=some.fixed_dictionaries({name: some.booleans() for name in ("checkpointing", "liger", "leaf", "overlap")}),
)
def test_the_string_is_the_setting(optimizer, flags, **values):
    setting = RunSetting.of("configs/models/llama-tiny.json", optimizer, **values, **flags)
    assert RunSetting.parse(str(setting)) == setting
    assert {**setting.as_dict(), **values, **flags} == setting.as_dict()


def test_a_command_line_serves_several_optimizers():
    args = argparse.Namespace(explore=8, adamw_states="full", zero="2", gpus=2, shape="64x2", output="x", rank=4)
    mofasgd, galore, adamw = (RunSetting.from_args(args, optimizer=name) for name in ("MoFaSGD", "GaLore", "AdamW"))
    assert mofasgd.run == "zero2:MoFaSGD:r=4:explore=8" and galore.run == "zero2:GaLore:r=4"
    assert (adamw.run, adamw.shape, adamw.gpus) == ("zero2:AdamW", "64x2", 2)
    args.adamw_states = "8bit"  # nobody is to take AdamW's column for one with these
    with pytest.raises(SettingError, match="adamw_states: of .*, not of AdamW. Leave it out"):
        RunSetting.from_args(args, optimizer="AdamW")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("zero4:MoFaSGD", "'zero4:MoFaSGD' cannot be run: give torch, ddp, .* or zero3, an optimizer"),
        ("torch:SGD", "AdamW, .*MoFaSGD"),
        ("torch:MoFaSGD:r", "an option is written NAME=VALUE, such as r=8, and not 'r'"),
        ("torch:MoFaSGD:r=many", "r is 'many': give a number"),
        ("torch:MoFaSGD:liger=yes", "liger is 'yes': give 0 or 1"),
        ("torch:MoFaSGD:colour=red", "no option colour; there are adamw, "),
        ("torch:MoFaSGD:head_loss=own", "head_loss is 'own': give fused"),
        ("torch:AdamW:explore=3", "explore: of MoFaSGD, not of AdamW"),
        ("zero0:AdamW:states=bf16", "Use stage 1 or 2"),
        (
            "zero3:AdamW:weights=fp32:reshard=0",
            "weights, reshard with zero3: FSDP2's alone. Leave it out, or give fsdp2",
        ),
        ("fsdp2:AdamW:replicas=2", "replicas is 2 on 1 GPUs: give a divisor of 1"),
        ("fsdp2:AdamW:weights=fp16", "weights is 'fp16': give bf16, fp32 or int8"),
        ("fsdp2:AdamW:offload=optimizer", "its CPUOffloadPolicy takes the weights too. Give param"),
        ("ddp:AdamW:offload=param", "in ZeRO stages 1 to 3 and FSDP2"),
        ("ddp:LoRA:r=4", "LoRA with ddp: known of AdamW and .*MoFaSGD"),
    ],
)
def test_what_cannot_be(run, message):
    with pytest.raises(SettingError, match=message):
        RunSetting.parse(run)
    with pytest.raises(SettingError, match="'8 tokens' is not TOKENSxMICRO_BATCHES, such as 1024x8"):
        RunSetting.parse("torch:AdamW", shape="8 tokens")


def test_every_optimizer_of_the_registry_has_a_rule():
    for name in OPTIMIZERS:
        assert RunSetting.of("", name, rank=3).rule().r == 3
    assert RunSetting.of("", "Muon").rule() is None
