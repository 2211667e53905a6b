"""A YAML becomes runs, and a mistake in it is named before anything is trained."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from experiments.comparison.plan import load_plan
from experiments.comparison.training import check_settings
from launch.errors import UserError
from tests.experiments.comparisons import SHAPE, TRAINING, language_comparison, language_plan, sentences, tiny_encoder


def test_a_plan_is_every_point_of_every_grid_for_every_seed(tmp_path):
    grids = {"AdamW": {"lr": 1e-3}, "ours": {"optimizer": "MoFaSGD", "rank": [4, 8], "lr": [1e-3, 1e-2]}}
    plan = language_plan(tmp_path, optimizers=grids)
    assert [str(run) for run in plan.runs] == [
        f"{setting}, seed {seed}"
        for seed in (0, 1)  # outside, so that what an interruption leaves is whole seeds
        for setting in (
            "AdamW",
            "ours rank=4 lr=0.001",
            "ours rank=4 lr=0.01",
            "ours rank=8 lr=0.001",
            "ours rank=8 lr=0.01",
        )
    ]
    assert {setting.optimizer for setting in plan.settings} == {"AdamW", "MoFaSGD"}
    assert plan.settings[1].options == {"rank": 4, "lr": 1e-3}
    assert len({run.key for run in plan.runs}) == 10


def test_a_plan_can_be_restricted(tmp_path):
    plan = load_plan(language_comparison(tmp_path), labels=["AdamW"], seeds=[1])
    assert [str(run) for run in plan.runs] == ["AdamW, seed 1"]
    with pytest.raises(UserError, match="no 'MoFaSDG'; did you mean 'MoFaSGD'"):
        load_plan(language_comparison(tmp_path), labels=["MoFaSDG"])


def test_a_number_without_a_point_is_a_number(tmp_path):
    path = language_comparison(tmp_path)
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 1e-3"))
    assert "lr: 1e-3" in path.read_text()
    assert load_plan(path).settings[0].options["lr"] == 0.001


def test_the_key_of_a_run_is_all_that_decides_its_outcome(tmp_path):
    def first_key(folder: str, **sections) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        return language_plan(tmp_path / folder, **sections).runs[0].key

    key = first_key("a")
    assert first_key("b", optimizers={"another name": {"optimizer": "AdamW", "lr": 1e-3}}, seeds=[0, 7]) == key
    changed = [
        first_key("a", training=TRAINING | {"steps": 5}),
        first_key("a", training=TRAINING | {"warmup_steps": 2}),
        first_key("a", optimizers={"AdamW": {"lr": 2e-3}}),
        first_key("a", optimizers={"AdamW": {"lr": 1e-3, "weight_decay": 0.1}}),
        first_key("a", optimizers={"AdamW": {"optimizer": "Muon", "lr": 1e-3}}),
        first_key("a", seeds=[1]),
    ]
    path = language_comparison(tmp_path / "a")
    (tmp_path / "a" / "shape.json").write_text(json.dumps(SHAPE | {"hidden_size": 32}))
    changed.append(load_plan(path).runs[0].key)
    (tmp_path / "a" / "eval.txt").write_text("another text to evaluate on")
    changed.append(load_plan(path).runs[0].key)
    assert len({key, *changed}) == 1 + len(changed)


MISTAKES = {
    "no section 'optimisers'; did you mean 'optimizers'": {"optimisers": {}},
    "no task 'sst'; did you mean 'sst2'": {"task": {"name": "sst"}},
    "no option 'lenght'; did you mean 'length'": {"task": {"name": "lm", "model_config": "x", "lenght": 8}},
    "task: must be a mapping with a name, one of sst2, lm": {"task": {"name": ["lm"]}},
    "must be one name. Give each an entry": {"optimizers": {"both": {"optimizer": ["AdamW", "Muon"], "lr": 1e-3}}},
    "either model_config": {"task": {"name": "lm"}},
    "no data. Give --data_dir": {"task": {"name": "sst2"}},
    "no option 'step'; did you mean 'steps'": {"training": TRAINING | {"step": 3}},
    "training.steps: 4.0 must be a whole number": {"training": TRAINING | {"steps": 4.0}},
    "training.steps: True must be": {"training": TRAINING | {"steps": True}},
    "batch_size must be given": {"training": {"steps": 4, "eval_every": 2}},
    "one of linear, cosine, constant": {"training": TRAINING | {"schedule": "step"}},
    "warmup_steps: 4 must be >= 0 and < steps": {"training": TRAINING | {"warmup_steps": 4}},
    "max_grad_norm: 0 must be > 0": {"training": TRAINING | {"max_grad_norm": 0}},
    "seeds: [0, 0] must be a list of different": {"seeds": [0, 0]},
    "seeds: [] must": {"seeds": []},
    "optimizers.AdamW: must be a mapping with an lr": {"optimizers": {"AdamW": {"rank": 8}}},
    "AdamW, seed 0 and again, seed 0 are the same run": {
        "optimizers": {"AdamW": {"lr": 0.1}, "again": {"optimizer": "AdamW", "lr": 0.1}}
    },
    "optimizers.AdamW.lr: [] must be one or several": {"optimizers": {"AdamW": {"lr": []}}},
    "optimizers.AdamW.lr: [0.1, 0.1] must be": {"optimizers": {"AdamW": {"lr": [0.1, 0.1]}}},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_the_yaml_is_named(tmp_path, message):
    with pytest.raises(UserError, match=re.escape(message)):
        language_plan(tmp_path, **MISTAKES[message])


def test_a_key_given_twice_is_an_error(tmp_path):
    path = language_comparison(tmp_path)
    path.write_text(path.read_text() + "seeds: [5]\n")
    with pytest.raises(UserError, match="'seeds' is given twice"):
        load_plan(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimizer": "AdamV"}, "no optimizer 'AdamV'; did you mean 'AdamW'"),
        ({"optimizer": "MoFaSGD", "rnak": 4}, "did you mean 'rank'"),
        ({"optimizer": "GaLore", "rank": 0}, "rank=0 must be"),
        ({"optimizer": "LoRA"}, "rank"),
        ({"optimizer": "GaLore", "rank": 4, "sketched": True}, "no gradients to clip. Set training.max_grad_norm"),
        ({"optimizer": "CoMERA", "fp32_masters": True}, "pruning changes the shapes"),
        ({"optimizer": "CoMERA", "rank": 3, "late_after": 2}, "needs a target_loss"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_found_before_training(tmp_path, options, message):
    plan = language_plan(tmp_path, optimizers={"mine": {"lr": 1e-3, **options}})
    with pytest.raises(UserError, match=message):
        check_settings(plan.settings, plan.training, plan.task, "cpu")


SHIPPED = sorted(Path("experiments/configs/comparisons").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_comparison_builds(tmp_path, monkeypatch, path):
    encoder = tiny_encoder(tmp_path, width=128)  # as large as the ranks
    files = [encoder / "config.json", encoder / "model.safetensors", encoder / "tokenizer.json"]
    for module in ("sst2", "encoder"):
        monkeypatch.setattr(f"experiments.comparison.tasks.{module}.encoder_files", lambda name: files)
    decoder = tmp_path / "decoder"
    tiny = dataclasses.replace(language_plan(tmp_path).task, model_config="configs/models/llama-tiny.json")
    tiny.save(tiny.model(0), decoder)
    fine_tunes = "finetune" in path.stem
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 4)
    on_sentences = "name: sst2" in path.read_text()
    data = sentences(tmp_path) if on_sentences else tmp_path if fine_tunes else None
    plan = load_plan(path, data, pretrained=str(decoder) if fine_tunes else None)
    firsts = [next(s for s in plan.settings if s.label == label) for label in plan.labels]
    task = plan.task
    if on_sentences and task.model_config is not None:  # as the tokenizer, a small one of its kind
        task = dataclasses.replace(task, model_config="configs/models/bert-six-encoders-tiny.json")
    check_settings(firsts, plan.training, task, "cpu")
    assert len(plan.labels) > 1 and {setting.optimizer for setting in plan.settings} >= {"AdamW", "MoFaSGD"}
