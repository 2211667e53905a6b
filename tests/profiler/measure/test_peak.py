"""The stack at the peak, and which category has grown when the memory runs out, by hand."""

import torch
from torch import nn

from ds_mofa.profiler import MemoryProfiler, load_report
from ds_mofa.profiler.measure.curve import Span, curve
from ds_mofa.profiler.measure.history import from_snapshot
from ds_mofa.profiler.measure.out_of_memory import TEMPORARY, explain, gathered_up
from ds_mofa.profiler.measure.peak import at_peak
from ds_mofa.profiler.storages import Allocation

GB = 10**9


def test_by_hand():
    allocations = [
        Allocation(1, 100, 0, category="weights"),
        Allocation(2, 40, 10, 50, ("a.py:1 f",), "activations"),
        Allocation(3, 40, 20, 50, ("a.py:1 f",), "activations"),
        Allocation(4, 30, 30, 40, ("head.py:7 loss", "b.py:2 g"), "workspace"),
        Allocation(5, 60, 60, 70, ("later.py:1 h",), "workspace"),
    ]
    spans = [Span("forward", 5, 25), Span("backward", 25, 55), Span("capture", 28, 32)]
    found = at_peak(allocations, curve(allocations, 1, 100), spans)
    made = {"size": 30, "category": "workspace", "stack": ["head.py:7 loss", "b.py:2 g"]}
    assert found == {"phase": "capture", "allocation": made, "pieces": [
        {"category": "weights", "size": 100, "count": 1, "stack": []},
        {"category": "activations", "size": 80, "count": 2, "stack": ["a.py:1 f"]},
        {**made, "count": 1},
    ]}  # fmt: skip
    assert at_peak(allocations[:1], curve(allocations[:1], 1, 100), spans)["allocation"] is None


def test_of_the_allocators_history():
    """The stack that a snapshot of the documented form names."""
    frames = [
        {"filename": "model.py", "line": 12, "name": "forward"},
        {"filename": "train.py", "line": 3, "name": "main"},
    ]
    events = [
        {"action": "alloc", "addr": 1, "size": 512, "time_us": 10},
        {"action": "alloc", "addr": 600, "size": 1000, "time_us": 20, "frames": frames},
        {"action": "free_requested", "addr": 600, "size": 1000, "time_us": 30},
    ]
    found = from_snapshot({"device_traces": [events], "segments": []}, 0, 512, 1_000_000)
    for one in found:
        one.category = "activations"
    peak = at_peak(found, curve(found, 1), [])
    assert peak["allocation"] == {
        "size": 1024,
        "category": "activations",
        "stack": ["model.py:12 forward", "train.py:3 main"],
    }


class Wasteful(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return self.waste(self.linear(x))

    def waste(self, x):
        return x.repeat(512, 1).square().mean()


def test_a_run_names_the_line(tmp_path):
    model = Wasteful()
    with MemoryProfiler(output_dir=tmp_path, detail_step=0) as profiler:
        profiler.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model(torch.ones(8, 64)).backward()
        profiler.step()
    (rank,) = load_report(tmp_path / "report.json")["ranks"]
    assert rank["peak"]["phase"] == "backward"
    largest = rank["peak"]["pieces"][0]
    assert largest["size"] >= 512 * 8 * 64 * 4
    lines = [line for piece in rank["peak"]["pieces"] for line in piece["stack"]]
    assert any("test_peak.py" in line and line.endswith(" waste") for line in lines)
    text = (tmp_path / "report.md").read_text()
    assert "### The stack at the peak" in text and "test_peak.py" in text.split("### The stack at the peak")[1]
    assert not any("storages.py" in line for line in lines)


def test_what_grew():
    before = gathered_up({"weights": 16 * GB, "AdamW states": 4 * GB, "activations": GB, "workspace": GB})
    now = gathered_up({"weights": 16 * GB, "AdamW states": 4 * GB}, allocated=23 * GB)
    assert before == {"weights": 16 * GB, "AdamW states": 4 * GB, TEMPORARY: 2 * GB} and now[TEMPORARY] == 3 * GB
    options = {"step": 0, "phase": "forward", "asked": GB, "free": 0, "of": "the beginning"}
    most, document = explain(now=now, before=before, **options)
    [table, advice] = document.sections[0].blocks
    assert most == TEMPORARY and "Shorter sequences" in advice.text
    assert table.rows == [
        [TEMPORARY, "3.000", "2.000", "1.000"], ["weights", "16.000", "16.000", "0.000"],
        ["AdamW states", "4.000", "4.000", "0.000"], ["sum", "23.000", "22.000", "1.000"],
    ]  # fmt: skip
    most, document = explain(now={**now, "AdamW states": 9 * GB}, before=before, **options)
    assert most == "AdamW states" and "AdamW states have grown most, by 5.00 GB" in document.subtitle
    assert "8bit" in document.sections[0].blocks[1].text
    assert explain(now={}, before={}, **options)[0] == TEMPORARY
