"""Runs beside each other: what differs between two, pages of any number, and where they are read from."""

import copy
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from ds_mofa import commands
from ds_mofa.profiler.report import comparing
from ds_mofa.profiler.report.command import main
from ds_mofa.profiler.report.difference import difference
from ds_mofa.profiler.report.document import Table
from ds_mofa.profiler.report.runs import read_runs, settings_of

GB = 10**9


def run_report(name: str, categories: dict[str, int], ranks: int = 1, command: str = "", **throughput) -> dict:
    """A report as the profiler writes it, of ranks that are each a GB fuller than the one before."""
    report = {
        "schema_version": 1, "kind": "run", "created": "2026-11-26T10:00:00+00:00", "command": command.split(),
        "setting": {"name": name, "seconds_per_step": 2.0}, "environment": {"torch": "2.11"}, "measured": "device memory",
        "predicted": None, "notes": [], "ranks": [],
    }  # fmt: skip
    for number in range(ranks):
        parts = {**categories, "unexplained": number * GB}
        total = sum(parts.values())
        peaks = {"allocated": total - GB, "reserved": total, "nvml_device": total, "nvml_process": None, "host": 2 * GB}
        report["ranks"].append({
            "rank": number, "device": "NVIDIA Fake", "peaks": peaks, "steps": 3, "step_seconds": [1.0 + number, 3.0, 2.0],
            "breakdown": {"meter": "NVML, in use on the device", "total": total, "categories": parts},
            "overhead": {"seconds_per_step": 0.0, "share_of_step": 0.0}, "phases": [], "phase_peaks": [], "layers": [],
            "timeline": {"seconds": [0.0], "allocated": [1], "reserved": [1], "nvml_device": [1], "host": [1]},
            "step_timeline": None, "throughput": {"tokens_per_second": 1000.0 * (number + 1), **throughput},
        })  # fmt: skip
    return report


def small(**others) -> dict:
    return run_report("small", {"weights": 16 * GB, "gradients": 2 * GB, "activations": 3 * GB}, **others)


def large(**others) -> dict:
    return run_report("large", {"weights": 16 * GB, "gradients": 16 * GB, "AdamW states": 32 * GB}, **others)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    documents = {
        "small": small(command="train.py --rank 8 --output_dir a"),
        "large": large(command="train.py --rank=32 --bf16 --output_dir b"),
        "both": {"runs": {"one": small(), "other": large(), "failed": {"error": "out of memory"}}},
        "predicted": {"MoFaSGD": {"allocated": 20 * GB, "total": 22 * GB, "categories": {"weights": 22 * GB}, "host": 0,
                                  "when": "loss", "setting": {"seq": 1024, "offload": None}}},
        "else": {"results": [1, 2]},
    }  # fmt: skip
    places = {}
    for name, document in documents.items():
        path = tmp_path / name / "report.json"
        path.parent.mkdir()
        path.write_text(json.dumps(document))
        places[name] = str(path)
    return places


def table_of(section) -> Table:
    return next(block for block in section.blocks if block.kind == "table")


def test_categories_are_sorted_by_how_far_they_are_apart():
    sections = {section.title: section for section in difference(("a", "b"), small(), large()).sections}
    table = table_of(sections["The peak by category, the largest difference first"])
    assert table.header == ["category, GB", "a", "b", "difference", ""] and table.summed
    assert [row[0] for row in table.rows] == ["AdamW states", "gradients", "activations", "weights", "sum"]
    assert table.rows[0] == ["AdamW states", "0.000", "32.000", "+32.000", "-"]
    assert table.rows[2] == ["activations", "3.000", "0.000", "-3.000", "-100.0%"]
    assert table.rows[-1] == ["sum", "21.000", "64.000", "+43.000", "+204.8%"]
    peaks = table_of(sections["Peaks"])
    assert ["host, GB", "2.000", "2.000", "0.000", "+0.0%"] in peaks.rows
    assert not any(row[0].startswith("NVML, process") for row in peaks.rows), "no one measured it"


def test_the_other_way_round_the_signs_change():
    one, other = difference(("a", "b"), small(), large()), difference(("b", "a"), large(), small())
    first, second = (table_of(document.sections[1]).rows for document in (one, other))
    assert [row[0] for row in first] == [row[0] for row in second]
    assert [(row[1], row[2]) for row in first] == [(row[2], row[1]) for row in second]
    assert first[0][3] == "+32.000" and second[0][3] == "-32.000"


def test_settings_that_changed_and_no_others(files, capsys):
    main(["--diff", files["small"], files["large"]])
    printed = capsys.readouterr().out
    settings = printed.split("## The peak")[0]
    assert "| --rank | 8 | 32 |" in settings and "| --bf16 | - | on |" in settings
    assert "output_dir" not in settings and "torch" not in settings and "seconds" not in settings
    assert "| tokens/s of a rank | 1,000 | 1,000 | +0.0% |" in printed and "Notes" not in printed


def test_a_prediction_beside_a_run_and_one_of_many(files, capsys, tmp_path):
    main(["--diff", files["predicted"], files["both"] + "#other", "--output_dir", str(tmp_path / "page")])
    printed = capsys.readouterr().out
    assert "# MoFaSGD and other" in printed and "| AdamW states | 0.000 | 32.000 |" in printed
    assert "The sums are of different meters: NVML, in use on the device, a prediction." in printed
    assert "Speed and energy" not in printed
    assert "<td>AdamW states</td>" in (tmp_path / "page/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--diff", "both", "small"], r"holds 3 runs: choose one, such as .*report.json#one'. There are one, other"),
        (["--diff", "both#failed", "small"], "has not been measured"),
        (["--diff", "both#gone", "small"], "holds no run 'gone'; there are one, other, failed"),
        (["else"], "is no report.json"),
        (["nowhere"], "cannot be read"),
        (["small", "predicted"], "MoFaSGD: a prediction has no page. --diff compares"),
    ],
)
def test_what_is_no_run(files, words, message):
    places = [files[word.split("#")[0]] + word[len(word.split("#")[0]) :] if word.split("#")[0] in files else word
              for word in words]  # fmt: skip
    with pytest.raises(SystemExit, match=message):
        main(places)
    with pytest.raises(SystemExit):
        main([])


def test_a_page_of_several_files(files, tmp_path, capsys):
    out = tmp_path / "out"
    commands.main(["report", files["small"], files["both"], "--output_dir", str(out), "--title", "Runs & more"])
    wrote = f"wrote {out / 'report.md'}, {out / 'report.html'} and {len(list(out.glob('*.png')))} pictures\n"
    assert capsys.readouterr().out.endswith(wrote)
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "<title>Runs &amp; more</title>" in page and "http" not in page
    assert "| small |" in text and "| one |" in text and "- failed: out of memory" in text
    again = tmp_path / "again"
    main([str(out / "report.json"), "--output_dir", str(again), "--title", "Runs & more"])
    assert (again / "report.html").read_text() == page, "its own report.json is read as well"


def test_runs_of_one_name_are_told_apart(files):
    assert list(read_runs([files["small"], files["small"]])) == ["small", "small (small)"]
    names = read_runs([files["small"], files["small"], files["small"]])
    assert len(names) == 3 and all(run["setting"]["name"] == "small" for run in names.values())


def test_any_number_of_runs_is_a_row_each():
    runs = {f"run {i}": run_report(f"run {i}", {"weights": (i + 1) * GB}) for i in range(40)}
    for table in (comparing.peaks(runs), comparing.breakdowns(runs), comparing.speeds(runs)):
        assert len(table.rows) == 40 and all(len(row) == len(table.header) <= 16 for row in table.rows)
    assert comparing.differing(runs) is None, "but for their names they are alike"
    other = copy.deepcopy(runs["run 0"])
    other["environment"]["torch"] = "2.13"
    table = comparing.differing({"a": runs["run 0"], "b": other})
    assert (table.header, table.rows) == (["run", "torch (version)"], [["a", "2.11"], ["b", "2.13"]])


def test_the_least_and_the_most_over_ranks():
    table = table_of(comparing.over_ranks(small(ranks=3, tokens_per_joule=2.5)))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["NVML, device"] == ["21.00 GB", "0", "23.00 GB", "2"]
    assert rows["tokens/s of a rank"] == ["1,000", "0", "3,000", "2"] and rows["tokens/J"][0] == "2.50"
    assert rows["ms a step"] == ["2,000.0", "0", "3,000.0", "2"] and "NVML, process" not in rows
    assert comparing.over_ranks(small()) is None


def test_a_report_of_before_has_no_speed_but_its_steps():
    report = small()
    del report["ranks"][0]["throughput"]
    assert comparing.speeds({"small": report}).rows == [["small", "2,000.0", "-", "-", "-"]]
    report["ranks"][0]["step_seconds"] = []
    assert comparing.speeds({"small": report}) is None


def test_settings_are_of_the_prediction_the_run_and_its_command():
    report = small(command="train.py --rank 8 --names a b --flag --x=1")
    report["predicted"] = {"setting": {"seq": 1024, "rank": 4, "offload": None}}
    found = settings_of(report)
    assert found == {
        "seq": "1024", "rank": "4", "offload": "-", "--names": "a b", "--flag": "on", "--x": "1", "ranks": "1",
        "device": "NVIDIA Fake", "torch (version)": "2.11",
    }  # fmt: skip


def test_the_report_of_this_repository_is_read():
    path = Path(__file__).resolve().parents[3] / "profiling/results/memory/report.json"
    assert len(read_runs([str(path)])) == 8
