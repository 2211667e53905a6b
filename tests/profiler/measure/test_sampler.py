"""The sampler against drivers that fail in every way that drivers do."""

import sys
import time
from pathlib import Path

import pytest
import torch

from ds_mofa.profiler.measure import sampler as sampler_module
from ds_mofa.profiler.measure.nvml import NvmlReader
from ds_mofa.profiler.measure.sampler import Sampler

sys.path.insert(0, str(Path(__file__).parent))
from fake_nvml import FakeNvml


def test_it_reads_device_and_process():
    reader = NvmlReader([0, 1], FakeNvml({0: 1000, 1: 2000}, own=500, pid=4), pid=4)
    assert reader.read() == ({0: 1001, 1: 2001}, {0: 500, 1: 500})
    assert (reader.name, reader.driver, reader.problems) == ("NVIDIA Fake", "580.1", [])


def test_a_process_that_the_driver_lists_under_another_number_is_not_guessed():
    # In a container the driver counts by the host's process ids.
    reader = NvmlReader([0], FakeNvml({0: 1000}, own=500, pid=4), pid=5)
    assert reader.read() == ({0: 1001}, {})


def test_a_driver_that_dies_in_the_middle():
    reader = NvmlReader([0, 1], FakeNvml({0: 10, 1: 20}, dies_at=3))
    seen = [reader.read()[0] for _ in range(6)]
    assert seen[:2] == [{0: 11, 1: 21}, {0: 12, 1: 22}] and seen[2:] == [{}] * 4
    assert not reader.alive
    assert [text.split(" (")[0].split(" at ")[0] for text in reader.problems] == [
        "NVML: device 0 stopped answering",
        "NVML: device 1 stopped answering",
    ]
    assert all("Unknown Error" in text for text in reader.problems)


def test_one_bad_reading_is_survived():
    reader = NvmlReader([0], FakeNvml({0: 10}, dies_at=2, back_at=4))
    assert [bool(reader.read()[0]) for _ in range(5)] == [True, False, False, True, True]
    assert reader.problems == []


def test_a_device_that_vanishes_leaves_the_others():
    reader = NvmlReader([0, 1], FakeNvml({0: 10, 1: 20}, vanishes=(1, 2)))
    for _ in range(5):
        used, _ = reader.read()
    assert used == {0: 15}
    assert len(reader.problems) == 1 and "device 1" in reader.problems[0] and "GPU is lost" in reader.problems[0]


def test_no_permission_for_processes_is_said_once_and_the_device_is_still_read():
    reader = NvmlReader([0], FakeNvml({0: 10}, permitted=False))
    assert [reader.read() for _ in range(3)] == [({0: 11}, {}), ({0: 12}, {}), ({0: 13}, {})]
    assert len(reader.problems) == 1 and "may not be listed (Insufficient Permissions)" in reader.problems[0]


def test_no_driver():
    reader = NvmlReader([0], FakeNvml({0: 10}, driver=False))
    assert reader.read() == ({}, {})
    assert reader.problems == ["NVML: the driver does not answer (Driver Not Loaded); no driver figures"]


def test_no_such_device():
    reader = NvmlReader([0, 7], FakeNvml({0: 10}))
    assert reader.read()[0] == {0: 11}
    assert "device 7 cannot be opened" in reader.problems[0]


def test_no_nvml_at_all(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    reader = NvmlReader([0])
    assert reader.read() == ({}, {}) and "pip install nvidia-ml-py" in reader.problems[0]


def wait_for(sampler: Sampler, count: int) -> None:
    """Until there are ``count`` samples: when that is, a busy machine decides."""
    deadline = time.monotonic() + 60
    while len(sampler.samples) < count:
        assert time.monotonic() < deadline, f"{len(sampler.samples)} samples in a minute"
        time.sleep(0.01)


def test_the_thread_samples_and_ends():
    nvml = FakeNvml({0: 100})
    sampler = Sampler(NvmlReader([0], nvml), hz=100)
    began = time.monotonic()
    sampler.start()
    wait_for(sampler, 20)
    sampler.stop()
    seconds, count = time.monotonic() - began, len(sampler.samples)
    assert count <= 100 * seconds + 3  # the first of the thread, that of start and that of stop
    assert nvml.shut and sampler.samples[-1].device_used[0] == 100 + count
    assert all(sample.host > 1e6 for sample in sampler.samples)
    assert 0 < sampler.gap() <= seconds and 0 < sampler.cost < 0.01 * count
    time.sleep(0.05)
    assert len(sampler.samples) == count


class Clock:
    """Time that passes where the thread waits, and where it is held up; it is told to stop after ``seconds``."""

    thread_time = staticmethod(time.thread_time)

    def __init__(self, seconds: float):
        self.now, self.end = 0.0, seconds

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return round(self.now * 1e9)

    def wait(self, seconds: float) -> bool:
        assert seconds >= 0
        self.now += seconds
        return self.now > self.end


def test_the_rate_is_kept_and_nothing_is_made_up_for_after_a_halt(monkeypatch):
    clock = Clock(seconds=1.995)
    monkeypatch.setattr(sampler_module, "time", clock)

    def allocator():
        if clock.now == 1:
            clock.now += 0.5  # the thread is held up

    sampler = Sampler(NvmlReader([0], FakeNvml({0: 100})), hz=64, allocator=allocator)
    sampler._stop = clock
    sampler._run()
    times = [sample.time / 1e9 for sample in sampler.samples]
    assert times == [i / 64 for i in range(65)] + [1.5 + i / 64 for i in range(32)]
    assert sampler.gap() == 0.5


def test_the_host_is_sampled_on_when_the_driver_is_gone():
    sampler = Sampler(NvmlReader([0], FakeNvml({0: 100}, dies_at=2)), hz=200)
    sampler.start()
    wait_for(sampler, 9)
    sampler.stop()
    assert sampler.samples[-1].device_used == {}
    assert any("stopped answering" in text for text in sampler.problems)


def test_an_error_in_the_thread_is_in_the_report():
    def broken():
        if broken.calls:
            raise OSError("out of handles")
        broken.calls += 1

    broken.calls = 0
    sampler = Sampler(NvmlReader([]), hz=200, allocator=broken)
    sampler.start()
    sampler._thread.join(60)
    assert sampler.problems == ["sampling stopped: OSError: out of handles"]


@pytest.mark.parametrize("hz", [0, -1, 5000])
def test_a_rate_out_of_range(hz):
    with pytest.raises(ValueError, match="sample_hz"):
        Sampler(NvmlReader([]), hz=hz)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_driver():
    reader = NvmlReader([torch.cuda._get_nvml_device_index(0)])
    torch.cuda.empty_cache()  # else what tests before this one have left is handed out, and the driver sees nothing
    before = sum(reader.read()[0].values())
    held = torch.ones(1 << 28, device="cuda")  # 1 GiB
    torch.cuda.synchronize()
    assert sum(reader.read()[0].values()) - before >= held.nbytes and reader.problems == []
