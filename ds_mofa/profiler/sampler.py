"""What the driver and the operating system say, read by a background thread from before the first allocation.

The allocator does not see the CUDA context or NCCL; the driver, asked through NVML, does. A sample misses what comes
and goes between two readings, so a report shows both. Whatever stops NVML (no driver, no permission, a device that
vanishes, a driver that dies) is kept as a sentence for the report, and the rest goes on being sampled.
"""

import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import psutil

__all__ = ["NvmlReader", "Sample", "Sampler"]

_GIVE_UP_AFTER = 3  # failed readings of one device in a row


@dataclasses.dataclass(frozen=True)
class Sample:
    """One reading. Bytes; None where the meter had no answer.

    Attributes:
        time: nanoseconds since the epoch.
        device_used: in use on the device by everybody, by NVML's index of the device.
        process_used: of that, by this process as the driver counts it.
        host: resident set of this process.
        allocator: (allocated, reserved) of PyTorch's allocator on the process's own device.
    """

    time: int
    device_used: dict[int, int]
    process_used: dict[int, int]
    host: int
    allocator: tuple[int, int] | None


class NvmlReader:
    """Memory of some devices through NVML, for as long as NVML answers.

    Args:
        devices: NVML's indices, which know nothing of CUDA_VISIBLE_DEVICES.
        nvml: the module; by default ``pynvml`` of nvidia-ml-py.
        pid: whose memory to look up.

    Attributes:
        problems: what went wrong, a sentence each, in the order in which it was noticed.
        name: of the first device, or None.
        driver: its version, or None.
    """

    def __init__(self, devices: Sequence[int], nvml: ModuleType | Any | None = None, pid: int | None = None):
        self.problems: list[str] = []
        self.name = self.driver = None
        self._pid = os.getpid() if pid is None else pid
        self._handles: dict[int, Any] = {}
        self._failures: dict[int, int] = {}
        self._processes = True
        self._nvml = nvml
        if devices:
            self._open(devices)

    @property
    def alive(self) -> bool:
        """Whether any device is still answered for."""
        return bool(self._handles)

    def _open(self, devices: Sequence[int]) -> None:
        if self._nvml is None:
            try:
                import pynvml
            except ImportError:
                self.problems.append(
                    "NVML: nvidia-ml-py is not installed (pip install nvidia-ml-py); no driver figures"
                )
                return
            self._nvml = pynvml
        try:
            self._nvml.nvmlInit()
            self.driver = _text(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError as error:
            self.problems.append(f"NVML: the driver does not answer ({error}); no driver figures")
            return
        for index in devices:
            try:
                self._handles[index] = self._nvml.nvmlDeviceGetHandleByIndex(index)
                self.name = self.name or _text(self._nvml.nvmlDeviceGetName(self._handles[index]))
            except self._nvml.NVMLError as error:
                self.problems.append(f"NVML: device {index} cannot be opened ({error}); it is not in the report")

    def read(self) -> tuple[dict[int, int], dict[int, int]]:
        """(in use on each device, in use by this process on each), bytes; without the devices that do not answer."""
        used, own = {}, {}
        for index, handle in list(self._handles.items()):
            try:
                used[index] = int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
                self._failures[index] = 0
            except self._nvml.NVMLError as error:
                self._failed(index, error)
                continue
            if self._processes:
                size = self._process_memory(index, handle)
                if size is not None:
                    own[index] = size
        return used, own

    def _process_memory(self, index: int, handle: Any) -> int | None:
        try:
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except self._nvml.NVMLError as error:
            self._processes = False
            self.problems.append(
                f"NVML: the processes on device {index} may not be listed ({error}); only the whole device is counted"
            )
            return None
        for process in running:
            if process.pid == self._pid:
                return None if process.usedGpuMemory is None else int(process.usedGpuMemory)
        return None

    def _failed(self, index: int, error: Exception) -> None:
        self._failures[index] = self._failures.get(index, 0) + 1
        if self._failures[index] < _GIVE_UP_AFTER:
            return
        del self._handles[index]
        self.problems.append(
            f"NVML: device {index} stopped answering at {time.strftime('%H:%M:%S')} ({error}); its figures end there"
        )

    def close(self) -> None:
        """Let go of the driver. A driver that has died takes no goodbye, which changes nothing."""
        if self._handles:
            self._handles = {}
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError as error:
                self.problems.append(f"NVML: shutting down failed ({error}); the figures are not affected")


class Sampler:
    """Reads everything ``hz`` times a second on a daemon thread between :meth:`start` and :meth:`stop`.

    Args:
        reader: of the driver.
        hz: samples per second.
        allocator: gives (allocated, reserved) in bytes, or None while there is nothing to ask.

    Attributes:
        samples: in order of time.
        cost: seconds of CPU time that the thread has used.

    Raises:
        ValueError: ``hz`` outside (0, 1000].
    """

    def __init__(
        self, reader: NvmlReader, hz: float = 20.0, allocator: Callable[[], tuple[int, int] | None] | None = None
    ):
        if not 0 < hz <= 1000:
            raise ValueError(f"sample_hz is {hz}: give a number of samples per second above 0 and up to 1000")
        self.reader, self.hz = reader, hz
        self.samples: list[Sample] = []
        self.cost = 0.0
        self._allocator = allocator or (lambda: None)
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._failed: str | None = None

    def start(self) -> None:
        self.sample()
        self._thread = threading.Thread(target=self._run, name="memory sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end the thread."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self.sample()
        self.reader.close()

    def sample(self) -> Sample:
        """Take one now, on the caller's thread."""
        with self._lock:  # NVML's counters of failures are the reader's own
            used, own = self.reader.read()
            sample = Sample(time.time_ns(), used, own, self._process.memory_info().rss, self._allocator())
            self.samples.append(sample)
        return sample

    @property
    def problems(self) -> list[str]:
        """Sentences for the report, the thread's own end among them."""
        return self.reader.problems + ([self._failed] if self._failed else [])

    def _run(self) -> None:
        next_time = time.monotonic()
        try:
            while not self._stop.wait(max(0.0, next_time - time.monotonic())):
                self.sample()
                # From now on, not from when it should have been: a thread held up does not catch up in a burst.
                next_time = max(next_time + 1 / self.hz, time.monotonic())
        except Exception as error:  # a daemon thread's exception would end on stderr and in no report
            self._failed = f"sampling stopped: {type(error).__name__}: {error}"
        finally:
            self.cost = time.thread_time()

    def gap(self) -> float:
        """The longest time between two samples, seconds."""
        times = [sample.time for sample in self.samples]
        return max((b - a for a, b in itertools.pairwise(times)), default=0) / 1e9


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
