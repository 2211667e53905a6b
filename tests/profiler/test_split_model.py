"""``python -m ds_mofa split``: the split that training makes, and the bytes that the predictor has for the same run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_mofa import MoFaSGD
from ds_mofa.__main__ import main
from ds_mofa.options import OptionError
from ds_mofa.profiler.predict.always import always
from ds_mofa.profiler.predict.prediction import plan_of
from ds_mofa.profiler.setting import RunSetting
from ds_mofa.split_model import build, described

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/models/llama-tiny.json")
SPLIT = ("weights", "sketches", "factors")


def of(source, gpus=1, optimizer="MoFaSGD", **params):
    return described(build(source, torch.bfloat16), params, optimizer=optimizer, gpus=gpus)


@pytest.mark.parametrize("optimizer", ["MoFaSGD", "GaLore"])
@pytest.mark.parametrize(
    ("engine", "run"),
    [("one process", {}), ("zero2", {"zero": 2, "gpus": 2}), ("zero3", {"zero": 3, "gpus": 2}),
     ("fsdp2", {"backend": "fsdp2", "gpus": 2})],
)  # fmt: skip
def test_what_stands_between_steps_is_what_the_predictor_says(engine, run, optimizer):
    there = always(plan_of(RunSetting.of(TINY, optimizer, rank=8, seq=64, **run)))
    found = of(TINY, run.get("gpus", 1), optimizer, rank=8)["bytes"][engine]
    for kind in SPLIT:
        assert found[kind] == pytest.approx(there[kind], rel=1e-3), kind
    assert found["AdamW states"] == pytest.approx(there["AdamW states"] + there.get("master weights", 0), rel=1e-3)
    assert found["all"] == sum(size for kind, size in found.items() if kind != "all")
    other = of(TINY, run.get("gpus", 1), optimizer, rank=16)["bytes"][engine]
    assert other["sketches"] > 1.9 * found["sketches"] and other["weights"] == found["weights"]  # the control


def test_it_is_the_split_of_the_optimizer():
    model = build(TINY, torch.float32).to_empty(device="cpu")
    optimizer = MoFaSGD(model, rank=16, include=["lm_head"])
    found = of(TINY, rank=16, include=["lm_head"])
    assert found["on_adamw"] == sum(rest.numel for rest in optimizer.split.leftovers)
    assert found["share"] == optimizer.split.share and found["matrices"] == 29
    assert found["on_adamw"] + found["on_matrices"] == found["trained"] == found["parameters"]


def test_8bit_states_masters_and_what_is_left_are_counted():
    whole, eight = of(TINY), of(TINY, adamw_states="8bit", master_weights=True)
    states = [found["bytes"]["one process"]["AdamW states"] for found in (whole, eight)]
    assert states[0] == 4 * whole["on_adamw"] and 2.03 < states[1] / whole["on_adamw"] < 2.2  # norms keep 32 bits
    assert eight["bytes"]["one process"]["matrices' masters"] == 4 * eight["on_matrices"]
    first = whole["largest_on_adamw"][0]
    assert (first["name"], first["parameters"], first["reason"]) == (
        "model.embed_tokens.weight",
        320 * 192,
        "embedding",
    )


def test_experts_of_real_size_are_matrices():
    """Mixtral 8x7B, by the sizes of its card: 47 B parameters, of which 45 B are stacks."""
    found = of(str(ROOT / "configs/models/mixtral-8x7b.json"), gpus=8, rank=8)
    assert found["parameters"] == 46_702_792_704
    assert found["matrices"] == 32 * (2 * 8 + 4)
    assert found["share"] > 0.99 and "warning" not in found["summary"]
    excluded = of(str(ROOT / "configs/models/mixtral-8x7b.json"), gpus=8, rank=8, exclude=["experts"])
    stacks = excluded["largest_on_adamw"][:2]
    assert [rest["reason"] for rest in stacks] == ["excluded by pattern"] * 2
    assert sum(rest["parameters"] for rest in stacks) == 32 * 8 * 3 * 4096 * 14336
    assert excluded["share"] < 0.03 and "warning: 2.9 % of" in excluded["summary"]


def test_the_command_prints_both_forms(capsys):
    main(["split", TINY, "--rank", "8", "--gpus", "4"])
    shown = capsys.readouterr().out
    assert (
        "28 matrices of rank 8 on MoFaSGD" in shown and "between steps, on each of 4 GPUs" in shown and "zero3" in shown
    )
    main(["split", TINY, "--rank", "8", "--include", "lm_head", "--json"])
    assert json.loads(capsys.readouterr().out)["matrices"] == 29


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([TINY, "--rank", "0"], "rank=0"),
        ([TINY, "--include", "nowhere"], "'nowhere' matches no trained parameter"),
        (["no/such/folder/at/all"], "no/such/folder/at/all: no model can be built"),
        ([str(ROOT / "configs/zero2_mofasgd.json")], '"model_type"'),
    ],
)
def test_what_cannot_be_is_an_error_without_a_traceback(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["split", *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_composite_config_has_a_split(tmp_path):
    file = tmp_path / "config.json"
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision | {"image_size": 28, "patch_size": 14},
    }
    file.write_text(json.dumps(shape))
    assert of(str(tmp_path), rank=4)["model"] == "Gemma3ForConditionalGeneration"
    file.write_text("{}")
    with pytest.raises(OptionError, match="no model can be built"):
        of(str(file))


@pytest.mark.slow
def test_python_runs_it_as_a_module():
    command = [sys.executable, "-m", "ds_mofa", "split", TINY, "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["matrices"] == 28
