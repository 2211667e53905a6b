"""The numbers of a comparison are what they say, and its page needs nothing else."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from ds_mofa.profiler.report.styles import HIGHLIGHTED
from experiments import compare
from experiments.comparison.curves import charts, styles
from experiments.comparison.plan import load_plan
from experiments.comparison.published import matched
from experiments.comparison.report import write_report
from experiments.comparison.results import check_control
from experiments.comparison.summary import stat, summarise
from experiments.comparison.tables import best_table, notes, shown_metric
from launch.errors import UserError
from tests.experiments.comparisons import language_plan, row, sentences, tiny_encoder


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
    assert best.setting.options["lr"] == 5e-4, "1.8 on dev against 1.85; 8 on test against 1"
    assert (best.dev.mean, best.test.mean) == pytest.approx((1.8, 8.0))
    assert best.dev.spread == pytest.approx(0.02**0.5)
    cells = dict(zip(best_table(summary).header, best_table(summary).rows[0]))
    assert cells["dev loss"] == "2.1000 ± 0.1414" and cells["test loss"] == "2.2000 ± 0.2828"
    assert cells["tokens/s"] == "1,000" and cells["peak resident, GB"] == "1.50"
    assert cells["state, MB"] == "2.00" and cells["trained"] == "3.00 M"


def test_of_an_accuracy_the_highest_is_best_and_shown_in_percent(tmp_path):
    task = {"name": "sst2", "encoder": str(tiny_encoder(tmp_path)), "data_dir": str(sentences(tmp_path))}
    plan = language_plan(tmp_path, task=task, seeds=[0])
    values = {(0, 0): {"dev": 0.8}, (1, 0): {"dev": 0.7}, (2, 0): {"dev": 0.9, "test": 0.856}}
    summary = summarise(plan, outcomes(plan, values))
    best = summary.best["MoFaSGD"]
    assert best.setting.options["lr"] == 2e-3
    assert shown_metric(plan, best.test) == "85.60 %"
    drawn = {chart.name: [list(series.mean) for series in chart.series] for chart in charts(summary)}
    assert drawn["dev_accuracy_by_step"] == [[80.0, 80.0], [90.0, 90.0]] and drawn["learning_rates"] == [[70.0, 90.0]]
    assert drawn["dev_loss_by_step"] == [[0.8, 0.8], [0.9, 0.9]], "a loss is no share"


def test_a_setting_that_diverged_for_one_seed_is_not_the_best(tmp_path):
    plan = language_plan(tmp_path)
    values = {(s, k): {"dev": 5.0} for s in range(3) for k in range(2)}
    values[1, 0] = {"dev": 0.1}
    values[1, 1] = {"dev": 0.1, "diverged_at": 3}
    summary = summarise(plan, outcomes(plan, values))
    assert summary.best["MoFaSGD"].setting.options["lr"] == 2e-3
    assert [outcome.diverged for outcome in summary.outcomes] == [0, 1, 0]
    values[0, 0] = values[0, 1] = {"dev": 0.1, "diverged_at": 1, "units_per_second": None}
    summary = summarise(plan, outcomes(plan, values))
    assert best_table(summary).rows[0][1:4] == ["diverged", "diverged", "-"]
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
    assert [r[-1] for r in best_table(summary).rows] == ["lr 0.003", "lr 0.001 *"]
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


def test_seeds_of_a_gpu_and_of_a_cpu_make_one_table(tmp_path):
    plan = language_plan(tmp_path, seeds=[0, 1])
    on_gpu = {"dev": 1.0, "peak_allocated": 2_500_000_000}
    rows = outcomes(plan, {(s, seed): on_gpu if seed else {"dev": 1.0} for s in range(3) for seed in range(2)})
    table = best_table(summarise(plan, rows))
    assert dict(zip(table.header, table.rows[0]))["peak allocated, GB"] == "2.50"
    first = rows[plan.run(plan.settings[0], 1).key]
    first["peak_allocated"] = None  # now one setting has none at all
    table = best_table(summarise(plan, rows))
    assert dict(zip(table.header, table.rows[0]))["peak resident, GB"] == "1.50"


def test_the_order_in_which_runs_ended_does_not_matter(tmp_path):
    plan = language_plan(tmp_path)
    rows = outcomes(plan, {(s, k): {"dev": 1.0 + s + k, "jobs": 3} for s in range(3) for k in range(2)})
    written = []
    for order in (list(rows), list(rows)[::-1]):
        write_report(plan, {key: rows[key] for key in order}, tmp_path)
        written.append([(tmp_path / name).read_text() for name in ("summary.md", "summary.json", "report.html")])
    assert written[0] == written[1] and "Up to 3 runs shared the device" in written[0][0]


def test_curves_by_second_start_after_what_compiles(tmp_path):
    plan = language_plan(tmp_path, seeds=[0])
    rows = outcomes(plan, {(s, 0): {"dev": 1.0, "compiling_seconds": 0.75} for s in range(3)})
    drawn = {chart.name: chart for chart in charts(summarise(plan, rows))}
    assert [list(series.x) for series in drawn["dev_loss_by_second"].series] == [[0.25, 1.25]] * 2
    assert [list(series.x) for series in drawn["dev_loss_by_step"].series] == [[2, 4]] * 2


class Page(HTMLParser):
    """Collects what a page refers to and says, and checks that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.references, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        names = ("src", "href", "srcset", "data", "action")
        self.references += [value for name, value in attributes if name in names and not value.startswith("#")]
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
    assert not re.search(r"url\((?!#)", text) and "@import" not in text and "http" not in text
    assert page.tags.count("svg") == 4
    labels = [word for word in page.words if word == "MoFaSGD"]
    assert len(labels) == 6, "a row of the table and of the rates', and a line in each figure"
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
    assert {key for setting in summary["settings"] for key in setting["runs"]} == set(rows)


def test_what_has_no_value_has_no_column(tmp_path):
    optimizers = {"AdamW": {"lr": 1e-3}, "Muon": {"lr": 1e-3}}
    plan = language_plan(tmp_path, optimizers=optimizers, seeds=[0])
    write_report(plan, outcomes(plan, {(s, 0): {"dev": 1.0 + s} for s in range(2)}), tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "best of its grid" not in text and "diverged" not in text and "| AdamW | 1.0000 |" in text


def test_in_colour_are_the_first_of_the_yaml_and_the_best_of_the_others(tmp_path):
    names = [f"method {i}" for i in range(9)]
    optimizers = {name: {"optimizer": "AdamW", "lr": 1e-3 + i} for i, name in enumerate(names)}
    plan = language_plan(tmp_path, optimizers=optimizers, seeds=[0])
    losses = [9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0]
    values = {(i, 0): {"dev": loss} for i, loss in enumerate(losses)}
    values[3, 0] |= {"diverged_at": 2}
    drawn = styles(summarise(plan, outcomes(plan, values)))
    assert [name for name in names if drawn[name].strong] == [names[i] for i in (0, 1, 5, 6, 7, 8)]
    assert drawn["method 0"] == HIGHLIGHTED[0] and drawn["method 1"] == HIGHLIGHTED[1]


def test_a_report_is_made_anew_without_the_data(tmp_path):
    plan = language_plan(tmp_path)
    rows = outcomes(plan, {(s, k): {"dev": 2.0 + s + k} for s in range(3) for k in range(2)})
    write_report(plan, rows, tmp_path / "first")
    by_hand = [
        {"optimizer": run.setting.optimizer, "options": dict(run.setting.options), **rows[run.key], "key": str(i)}
        for i, run in enumerate(plan.runs)
    ]
    (tmp_path / "first/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in by_hand))
    (tmp_path / "train.txt").unlink()
    arguments = [str(tmp_path / "tiny.yaml"), "--only_report", "--device", "cpu", "--output_dir"]
    shown = [path for path in (tmp_path / "first").iterdir() if path.suffix in (".md", ".html", ".png")]
    before = [path.read_bytes() for path in shown]
    for path in shown:
        path.unlink()
    compare.main([*arguments, str(tmp_path / "first")])
    assert [path.read_bytes() for path in shown] == before and len(shown) == 6
    kept = [row for row in by_hand if row["options"] != dict(plan.settings[1].options)]
    assert len(kept) == 4
    plan, found = matched(load_plan(tmp_path / "tiny.yaml", identify=False), {row["key"]: row for row in kept})
    assert [str(setting) for setting in plan.settings] == ["AdamW", "MoFaSGD lr=0.002"] and len(found) == 4
    with pytest.raises(UserError, match="no row of results.jsonl is of this YAML"):
        matched(plan, {})
    with pytest.raises(UserError, match="has no results.jsonl"):
        compare.main([*arguments, str(tmp_path / "nothing")])
