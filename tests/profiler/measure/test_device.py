"""The profiler's arithmetic on a device, with a driver and an allocator that say what they are told."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ds_mofa.profiler import MemoryProfiler, load_report
from ds_mofa.profiler.measure import meters, out_of_memory, recorded
from ds_mofa.profiler.storages import Allocation

sys.path.insert(0, str(Path(__file__).parent))
from fake_nvml import FakeNvml

GB = 10**9


class FakeDevice:
    """A driver (whole device) and a caching allocator under one roof; sizes in bytes."""

    def __init__(self):
        self.outside, self.allocated, self.reserved, self.peak = 2 * GB, 0, 0, 0
        self.initialized = False

    def open(self, device):
        self.initialized, self.outside = True, self.outside + GB // 2
        self.hold(512, 2 << 20)

    def hold(self, allocated, reserved):
        self.allocated, self.reserved = self.allocated + allocated, self.reserved + reserved
        self.peak = max(self.peak, self.allocated)

    def stats(self, device):
        count = {"current": self.allocated, "peak": self.peak}
        held = {"current": self.reserved, "peak": self.reserved}
        return {"allocated_bytes": {"all": count}, "reserved_bytes": {"all": held}}

    def reset(self, device):
        self.peak = self.allocated


class Nvml(FakeNvml):
    def __init__(self, device):
        super().__init__({3: 0})
        self.device = device

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self.device.outside + self.device.reserved)


class History:
    """What the allocator's history would be: weights from before, and an activation born in forward."""

    def __init__(self, device, stacks):
        self.snapshot = {"stacks": stacks}

    def start(self):
        pass

    def stop(self):
        return [Allocation(1, 4 * GB, 0), Allocation(2, 3 * GB, History.forward, History.forward + 10)]


@pytest.fixture
def device(monkeypatch):
    fake, ranges = FakeDevice(), []
    for name, value in {
        "is_initialized": lambda: fake.initialized,
        "memory_stats_as_nested_dict": fake.stats,
        "reset_peak_memory_stats": fake.reset,
        "get_device_name": lambda device: "NVIDIA Fake",
        "_get_nvml_device_index": lambda device: 3,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", lambda name: ranges.append(name) or name)
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", lambda name: ranges.append(f"end {name}"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: ranges.append("capture"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: ranges.append("end capture"))
    monkeypatch.setattr(meters, "open_device", fake.open)
    monkeypatch.setattr(recorded, "CudaHistory", History)
    fake.ranges, fake.observers = ranges, []
    monkeypatch.setattr(out_of_memory, "_attached", False)
    attach = "_cuda_attach_out_of_memory_observer"  # a build without CUDA has none
    monkeypatch.setattr(torch._C, attach, fake.observers.append, raising=False)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: fake.allocated)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda device: {"segments": []})
    return fake


def test_the_sum_is_what_the_driver_saw(device, tmp_path):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"device": "cuda:0", "nvml": Nvml(device), "sample_hz": 200, "memory_snapshot": True}
    with MemoryProfiler(output_dir=tmp_path, **options) as profiler:
        device.hold(4 * GB, 5 * GB)  # the weights
        profiler.watch(model, optimizer)
        for _ in range(2):
            loss = model(torch.ones(2, 4)).sum()
            device.hold(3 * GB, 0 if profiler.steps else 4 * GB)
            loss.backward()
            device.hold(-3 * GB, 0)
            optimizer.step()
            optimizer.zero_grad()
            if profiler.steps == 1:
                History.forward = profiler._recorder.spans[0].start + 1
            profiler.step()
        device.outside += GB // 4  # something that nobody announces
        profiler._sampler.sample()
        assert profiler.peak_allocated == 7 * GB + 512
    (rank,) = load_report(tmp_path / "report.json")["ranks"]
    assert rank["peaks"]["allocated"] == 7 * GB + 512 and rank["peaks"]["allocated_while_building"] == 4 * GB + 512
    assert rank["peaks"]["reserved"] == 9 * GB + (2 << 20)
    parts = rank["breakdown"]["categories"]
    assert rank["breakdown"]["total"] == 2 * GB + GB // 2 + 9 * GB + (2 << 20) + GB // 4
    assert parts["before this process"] == 2 * GB and parts["CUDA context"] == GB // 2
    assert parts["activations"] == 3 * GB
    assert parts["allocator slack"] == 2 * GB + (2 << 20) - 512
    # The fake history's weights belong to no tensor of this model: unexplained, as is what came later.
    assert parts["unexplained"] == 4 * GB + 512 + GB // 4
    peaks = {phase["name"]: phase["peak_allocated"] for phase in rank["phases"]}
    assert peaks["forward"] == 4 * GB + 512 and peaks["backward"] == 7 * GB + 512
    assert device.ranges[:4] == ["step 0", "forward", "end forward", "backward"]
    assert device.ranges.index("capture") < device.ranges.index("end capture")
    assert (tmp_path / "snapshot_rank0.pickle").exists()


def test_without_permission_to_ask_the_driver(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", lambda device: exec("raise RuntimeError('no NVML')"))
    with MemoryProfiler(output_dir=tmp_path, device="cuda:0") as profiler:
        device.hold(GB, 2 * GB)
        profiler._recorder.between()
    report = load_report(tmp_path / "report.json")
    assert report["ranks"][0]["breakdown"]["meter"] == "PyTorch's allocator, reserved"
    assert any("(no NVML); no driver figures" in note for note in report["notes"])


def test_started_too_late_the_context_is_not_guessed(device, tmp_path):
    device.open(None)
    with MemoryProfiler(output_dir=tmp_path, device="cuda:0", nvml=Nvml(device)):
        pass
    report = load_report(tmp_path / "report.json")
    assert "CUDA context" not in report["ranks"][0]["breakdown"]["categories"]
    assert any("Start the profiler first" in note for note in report["notes"])


def test_when_the_memory_runs_out(device, tmp_path, capsys):
    """A longer sequence in the third step than in the recorded one: the observer's page says that it was activations."""
    model = torch.nn.Embedding(64, 4)
    trained = torch.optim.SGD(model.parameters())

    def run():
        with MemoryProfiler(output_dir=tmp_path, device="cuda:0", nvml=Nvml(device)) as profiler:
            device.hold(4 * GB, 5 * GB)
            profiler.watch(model, trained)
            for tokens in (16, 16, 4096):
                loss = model(torch.zeros(1, tokens, dtype=torch.long)).sum()
                device.hold(3 * GB if tokens == 16 else 9 * GB, 0)
                if tokens == 4096:
                    [observer] = device.observers
                    observer(1, 2 * GB, 0, GB)  # of another device: not ours
                    assert not list(tmp_path.glob("out_of_memory*"))
                    observer(0, 2 * GB, 80 * GB, GB)
                    raise torch.OutOfMemoryError("CUDA out of memory")
                loss.backward()
                device.hold(-3 * GB, 0)
                if profiler.steps == 1:
                    History.forward = profiler._recorder.spans[0].start + 1
                profiler.step()

    with pytest.raises(torch.OutOfMemoryError):
        run()
    text = (tmp_path / "out_of_memory_rank0.md").read_text()
    assert "In step 2, between phases: 2.00 GB were asked for, 1.00 GB were free on the device." in text
    # The fake's weights belong to no tensor: 4 + 9 GB now, 4 + 3 at the peak that was recorded.
    assert "Since the peak of step 1, activations and workspace have grown most, by 6.00 GB." in text
    assert "The largest forward was of 1 x 16 tokens then, and is of 1 x 4096 now." in text
    assert "| activations and workspace | 13.000 | 7.000 | 6.000 |" in text
    assert (tmp_path / "out_of_memory_rank0.pickle").exists()
    assert "ds_mofa: out of memory, rank 0: In step 2" in capsys.readouterr().err
    report = load_report(tmp_path / "report.json")
    assert any("ran out in step 2; activations and workspace have grown most" in note for note in report["notes"])
    device.observers[0](0, GB, GB, 0)  # the profiler has ended: nobody is asked, and nothing raises


def test_a_failure_while_it_is_written_does_not_hide_the_allocators(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda device: exec("raise RuntimeError('no history')"))
    with MemoryProfiler(output_dir=tmp_path, device="cuda:0", nvml=Nvml(device)) as profiler:
        device.observers[0](0, GB, GB, 0)
        assert any("there is no page on it: RuntimeError: no history" in note for note in profiler.notes)
