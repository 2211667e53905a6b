"""A driver that answers as it is told: used bytes by device, and failures from a given reading on."""

from types import SimpleNamespace


class NVMLError(Exception):
    pass


class FakeNvml:
    """Stands in for pynvml.

    Args:
        used: bytes in use on each device.
        own: bytes of process ``pid`` on each.
        dies_at: number of the reading from which nothing answers any more.
        vanishes: (device, reading) from which that one does not answer.
        back_at: number of the reading from which all is well again.
    """

    NVMLError = NVMLError

    def __init__(self, used, own=0, pid=1, dies_at=None, vanishes=None, back_at=None, permitted=True, driver=True):
        self.used, self.own, self.pid = dict(used), own, pid
        self.dies_at, self.vanishes, self.back_at = dies_at, vanishes, back_at
        self.permitted, self.driver = permitted, driver
        self.readings = dict.fromkeys(self.used, 0)
        self.shut = False
        self.millijoules = 0
        self.counts_energy = True

    def nvmlInit(self):
        if not self.driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self):
        return b"580.1"

    def nvmlDeviceGetHandleByIndex(self, index):
        if index not in self.used:
            raise NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA Fake"

    def nvmlDeviceGetMemoryInfo(self, handle):
        self.readings[handle] += 1
        reading = self.readings[handle]
        well = self.back_at is not None and reading >= self.back_at
        if self.dies_at is not None and reading >= self.dies_at and not well:
            raise NVMLError("Unknown Error")
        if self.vanishes is not None and handle == self.vanishes[0] and reading >= self.vanishes[1] and not well:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(used=self.used[handle] + reading)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        if not self.permitted:
            raise NVMLError("Insufficient Permissions")
        return [SimpleNamespace(pid=99, usedGpuMemory=7), SimpleNamespace(pid=self.pid, usedGpuMemory=self.own)]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.counts_energy:
            raise NVMLError("Not Supported")
        return self.millijoules

    def nvmlShutdown(self):
        self.shut = True
