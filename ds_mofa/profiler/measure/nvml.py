"""The memory of devices as the driver counts it, through NVML, for as long as NVML answers.

Whatever stops it (no driver, no permission, a device that vanishes, a driver that dies) is kept as a sentence for the
report.
"""

import os
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["NvmlReader"]

_GIVE_UP_AFTER = 3  # failed readings of one device in a row


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
        self.name: str | None = None
        self.driver: str | None = None
        self._pid = os.getpid() if pid is None else pid
        self._handles: dict[int, Any] = {}
        self._failures: dict[int, int] = {}
        self._processes = self._energy = True
        self._nvml: Any = nvml
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

    def joules(self, index: int) -> float | None:
        """What a device has used up since the driver was loaded; None where it is not counted."""
        if index not in self._handles or not self._energy:
            return None
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handles[index]) / 1e3
        except self._nvml.NVMLError as error:
            self._energy = False
            self.problems.append(f"NVML: device {index} does not count its energy ({error}); no tokens per joule")
            return None

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


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
