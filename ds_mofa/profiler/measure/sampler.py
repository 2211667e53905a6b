"""What the driver and the operating system say, read by a background thread from before the first allocation.

The allocator does not see the CUDA context or NCCL; the driver, asked through NVML, does. A sample misses what comes
and goes between two readings, so a report shows both.
"""

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable

import psutil

from ds_mofa.profiler.measure.nvml import NvmlReader

__all__ = ["Sample", "Sampler"]


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

    def joules(self, index: int) -> float | None:
        """What a device has used up; see :meth:`NvmlReader.joules`."""
        with self._lock:
            return self.reader.joules(index)

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
