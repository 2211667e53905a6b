"""The profiler on a real device: the sum is what NVML saw, and the parts are what the shapes say."""

import pytest
import torch
from torch import nn

import ds_mofa
from ds_mofa.profiler import MemoryProfiler, load_report
from ds_mofa.profiler.measure.layers import verdict

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_run(tmp_path):
    width, tokens = 2048, 4096
    with MemoryProfiler(output_dir=tmp_path, sample_hz=200, memory_snapshot=True) as profiler:
        with torch.device("cuda"):
            layers = nn.ModuleList(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(8))
        model = nn.Sequential()
        model.layers = layers
        model.forward = lambda x: _run(layers, x)
        optimizer = ds_mofa.MoFaSGD(model, lr=1e-3, rank=16)
        profiler.watch(model, optimizer)
        for _ in range(3):
            model(torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()
    (rank,) = load_report(tmp_path / "report.json")["ranks"]
    peaks, parts = rank["peaks"], rank["breakdown"]["categories"]
    assert rank["breakdown"]["total"] == peaks["nvml_device"] >= peaks["reserved"] >= peaks["allocated"]
    assert parts["weights"] == 8 * 2 * width * width
    assert parts["activations"] >= 8 * 2 * tokens * width
    # The history and the allocator's own counter tell of the same peak.
    assert abs(peaks["traced"] - peaks["allocated"]) <= 0.02 * peaks["allocated"]
    names = {phase["name"] for phase in rank["phases"]}
    assert {"forward", "backward", "capture", "reduce", "factor update", "gather", "apply"} <= names
    holds, text = verdict(rank["layers"])
    assert holds, text
    assert (tmp_path / "snapshot_rank0.pickle").stat().st_size > 1000


def _run(layers, x):
    for layer in layers:
        x = layer(x)
    return x.float().square().mean()


def test_when_the_memory_runs_out(tmp_path):
    """The allocator's own observer: a piece that no card holds, asked for in forward."""

    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64, device="cuda")

        def forward(self, x):
            kept = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
            torch.empty(1 << 42, dtype=torch.uint8, device="cuda")
            return self.linear(x) + kept[0]

    def run():
        with MemoryProfiler(output_dir=tmp_path) as profiler:
            model = Greedy()
            profiler.watch(model, torch.optim.SGD(model.parameters()))
            model(torch.ones(4, 64, device="cuda"))

    with pytest.raises(torch.OutOfMemoryError):
        run()
    text = (tmp_path / "out_of_memory_rank0.md").read_text()
    assert "In step 0, forward: 4,398.0 GB were asked for" in text
    assert "Since the beginning of the training, activations and workspace have grown most" in text
    assert (tmp_path / "out_of_memory_rank0.pickle").stat().st_size > 1000
