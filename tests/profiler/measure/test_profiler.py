"""A run on the CPU from the first allocation to the report, and misuse."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ds_mofa
from ds_mofa.profiler import MemoryProfiler, load_report
from ds_mofa.profiler.categories import CATEGORIES
from ds_mofa.profiler.measure.inventory import buckets, sizes
from ds_mofa.profiler.measure.layers import verdict
from ds_mofa.profiler.report import check, write_pages

WIDTH, TOKENS = 64, 256


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(32, WIDTH), nn.ModuleList(Layer() for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean(), "last": x}


def train(folder, optimizer: str, steps: int = 3, **options):
    with MemoryProfiler(output_dir=folder, sample_hz=200, setting={"name": optimizer}, **options) as profiler:
        model = Model()
        if optimizer == "MoFaSGD":
            trained = ds_mofa.MoFaSGD(model, lr=1e-3, rank=4)
        else:
            trained = torch.optim.AdamW(model.parameters(), lr=1e-3)
        profiler.watch(model, trained)
        for _ in range(steps):
            for _ in range(2):
                model(torch.arange(TOKENS) % 32)["loss"].backward()
            trained.step()
            trained.zero_grad()
            profiler.step()
    return profiler


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {name: tmp_path_factory.mktemp(name) for name in ("MoFaSGD", "AdamW")}
    for name, folder in found.items():
        train(folder, name)
    return found


def rank_of(folder):
    return load_report(folder / "report.json")["ranks"][0]


def test_phases(folders):
    counts = {phase["name"]: phase["count"] for phase in rank_of(folders["MoFaSGD"])["phases"]}
    assert counts == {
        "between phases": 0, "forward": 6, "backward": 6, "capture": 6 * 6, "reduce": 3, "AdamW": 3,
        "factor update": 3, "gather": 3, "apply": 3,
    }  # fmt: skip
    counts = {phase["name"]: phase["count"] for phase in rank_of(folders["AdamW"])["phases"]}
    assert counts == {"between phases": 0, "forward": 6, "backward": 6, "AdamW": 3}


def test_the_breakdown_is_what_the_shapes_say(folders):
    numel = 32 * WIDTH + 3 * 2 * 4 * WIDTH * WIDTH
    peaks = {peak["name"]: peak["breakdown"] for peak in rank_of(folders["AdamW"])["phase_peaks"]}
    assert peaks["backward"]["weights"] == peaks["backward"]["gradients"] == 4 * numel
    assert peaks["backward"]["AdamW states"] == 8 * numel + 4 * 7
    # What backward needs of each layer: its input, up's output (relu's, which up's becomes), and the loss's input.
    saved = 4 * TOKENS * WIDTH * (3 * (1 + 4) + 1)
    assert saved <= peaks["forward"]["activations"] <= saved + 4 * TOKENS * WIDTH * 5 + 4096
    ours = {peak["name"]: peak["breakdown"] for peak in rank_of(folders["MoFaSGD"])["phase_peaks"]}
    assert ours["backward"]["gradients"] == 4 * 32 * WIDTH
    assert ours["backward"]["sketches"] > 0 and ours["capture"]["factors"] == ours["apply"]["factors"]


def test_no_gradient_lives_and_adamws_do(folders):
    holds, text = verdict(rank_of(folders["MoFaSGD"])["layers"])
    assert holds, text
    entries = rank_of(folders["AdamW"])["layers"]
    assert [entry["layer"] for entry in entries] == ["layers.0", "layers.1", "layers.2"]
    assert not verdict(entries)[0] and entries[0]["held"] == 4 * 3 * 2 * 4 * WIDTH * WIDTH
    assert all(entry["passed_on"] == 4 * TOKENS * WIDTH for entry in entries)


def test_what_waits_for_its_sketch_is_known():
    x, dy = torch.ones(4, 8), torch.ones(4, 16)
    queue = SimpleNamespace(_waiting=[((0, 0, 0, 0), x, dy)])
    known = sizes(buckets(None, SimpleNamespace(_matrices=SimpleNamespace(_queue=queue))), "cpu")
    assert known == {"activations": x.nbytes, "workspace": dy.nbytes}


def test_a_gradient_that_is_kept_elsewhere_is_found(tmp_path):
    kept = []
    with MemoryProfiler(output_dir=tmp_path, detail_step=0) as profiler:
        model = Model()
        optimizer = ds_mofa.MoFaSGD(model, lr=1e-3, rank=4)
        for layer in model.layers:  # someone who looks at gradients, and does not let go of them
            layer.down.weight.requires_grad_(True)
            layer.up.register_full_backward_hook(lambda *_: kept.append(torch.zeros(4 * WIDTH, WIDTH)))
        profiler.watch(model, optimizer)
        model(torch.arange(TOKENS) % 32)["loss"].backward()
        profiler.step()
    holds, text = verdict(rank_of(tmp_path)["layers"])
    assert len(kept) == 3 and not holds, text


# What a reader of report.json may rely on: taking something away, or another meaning, is a new schema version. What is added
# is not in the reports of before.
NUMBER, TEXT = (int, float), str
SCHEMA = {
    "schema_version": int, "kind": TEXT, "created": TEXT, "command": list, "setting": dict, "environment": dict,
    "measured": TEXT, "ranks": list, "predicted": (dict, type(None)), "notes": list,
}  # fmt: skip
RANK = {
    "rank": int, "device": TEXT, "driver": (TEXT, type(None)), "measured": TEXT, "peaks": dict, "breakdown": dict,
    "phases": list, "phase_peaks": list, "layers": list, "peak": (dict, type(None)),
    "steps": int, "step_seconds": list, "sampling": dict,
    "throughput": dict, "overhead": dict, "timeline": dict, "step_timeline": (dict, type(None)), "notes": list,
}  # fmt: skip
PARTS = {
    "peaks": {"allocated", "allocated_while_building", "reserved", "traced", "nvml_device", "nvml_process", "host"},
    "breakdown": {"meter", "total", "categories"},
    "sampling": {"hz_asked", "samples", "longest_gap_seconds", "thread_cpu_share"},
    "throughput": {"tokens_per_step", "tokens_per_second", "mfu", "joules", "tokens_per_joule"},
    "overhead": {"seconds_per_step", "share_of_step"},
    "timeline": {"seconds", "nvml_device", "nvml_process", "allocated", "reserved", "host"},
    "step_timeline": {"milliseconds", "categories", "peak_milliseconds", "phases"},
}
PHASE = {"name", "count", "seconds", "peak_allocated", "peak_reserved", "peak_host"}


def test_the_schema(folders):
    report = json.loads((folders["MoFaSGD"] / "report.json").read_text())
    assert report["schema_version"] == 1 and report.keys() == SCHEMA.keys()
    for name, kind in SCHEMA.items():
        assert isinstance(report[name], kind), name
    (rank,) = report["ranks"]
    assert rank.keys() == RANK.keys()
    for name, kind in RANK.items():
        assert isinstance(rank[name], kind), name
    for name, keys in PARTS.items():
        assert rank[name].keys() == keys, name
    assert all(phase.keys() == PHASE for phase in rank["phases"])
    assert set(rank["breakdown"]["categories"]) <= set(CATEGORIES)
    assert sum(rank["breakdown"]["categories"].values()) == rank["breakdown"]["total"] == rank["peaks"]["host"]
    assert rank["sampling"]["samples"] > 3 and rank["measured"] == "host memory"
    assert any("No CUDA device" in note for note in report["notes"])


def test_a_damaged_or_foreign_report_is_refused(folders):
    report = json.loads((folders["AdamW"] / "report.json").read_text())
    with pytest.raises(ValueError, match="schema version 2, this ds_mofa reads 1"):
        check({**report, "schema_version": 2})
    report["ranks"][0]["breakdown"]["categories"]["weights"] += 1
    with pytest.raises(ValueError, match="has been edited or is damaged"):
        check(report)


def test_files(folders):
    names = {path.name for path in folders["MoFaSGD"].iterdir()}
    assert {"report.json", "report.md", "report.html"} <= names
    text = (folders["MoFaSGD"] / "report.md").read_text()
    assert "| **sum** |" in text and "When the backward of each of 3 layers is done" in text
    assert "![MoFaSGD: one step](step_MoFaSGD.png)" in text
    page = (folders["MoFaSGD"] / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and "<script" not in page


def test_png(folders):
    pytest.importorskip("matplotlib")
    for name in ("peak.png", "step_MoFaSGD.png", "run_MoFaSGD.png"):
        content = (folders["MoFaSGD"] / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 8000


def test_without_matplotlib_the_report_says_what_is_missing(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ds_mofa.profiler.report.drawing", None)
    report = load_report(folders["AdamW"] / "report.json")
    write_pages({"run": report}, tmp_path, report)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "pip install &#39;ds_mofa[profile]&#39;" in text or "pip install 'ds_mofa[profile]'" in text
        assert "<figure" not in text and "![" not in text
    assert not list(tmp_path.glob("*.png"))


def test_misuse(tmp_path):
    profiler = MemoryProfiler(output_dir=tmp_path)
    with pytest.raises(RuntimeError, match=r"call start\(\) first"):
        profiler.watch(Model())
    with pytest.raises(RuntimeError, match=r"step\(\) before watch"):
        profiler.start().step()
    with pytest.raises(RuntimeError, match="make a new one"):
        profiler.start()
    profiler.stop()
    with pytest.raises(ValueError, match="detail_step"):
        MemoryProfiler(detail_step=-1)


def test_the_model_is_left_as_it_was(tmp_path):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    with MemoryProfiler(model, optimizer, output_dir=tmp_path) as profiler:
        profiler.step()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert rank_of(tmp_path)["step_timeline"] is None
    assert any("Lower detail_step" in note for note in load_report(tmp_path / "report.json")["notes"])


def test_paused_steps_are_not_heard(tmp_path):
    with MemoryProfiler(output_dir=tmp_path) as profiler:
        model = Model()
        optimizer = ds_mofa.MoFaSGD(model, lr=1e-3, rank=4)
        profiler.watch(model, optimizer)
        with profiler.paused():
            model(torch.arange(8))["loss"].backward()
            optimizer.step()
            profiler.step()
    assert {phase["name"] for phase in rank_of(tmp_path)["phases"]} == {"between phases"}
