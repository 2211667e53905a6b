"""The meters of one process: the sampler, the counters of PyTorch's allocator, and what the driver gives beyond it."""

import os
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from ds_mofa.profiler.measure.nvml import NvmlReader
from ds_mofa.profiler.measure.sampler import Sample, Sampler

__all__ = ["Meters", "default_device", "several_ranks", "this_rank"]


class Meters:
    """What a run is measured with, from before the first allocation. Sizes in bytes.

    Args:
        device: the process's own; on a CPU only the host is sampled.
        sample_hz: readings of NVML and the host a second.
        nvml: a stand-in for pynvml.
        notes: where to put a sentence on what cannot be measured.

    Attributes:
        sampler: NVML and the host, on a thread.
        nvml_index: of the device; None where NVML is not asked.
        allocated_peak, reserved_peak: of the training so far, by the allocator.
        building_peak: allocated while model and optimizer were built.
        before: in use on the device before this process opened it; None where that is not known.
        context: taken from the driver when it did.
        base_host: resident set at the start.

    Raises:
        ValueError: ``sample_hz`` out of range.
    """

    def __init__(self, device: torch.device, sample_hz: float, nvml: ModuleType | Any | None, notes: list[str]):
        self.device, self._notes = device, notes
        self.cuda = device.type == "cuda"
        self.nvml_index = self._find_nvml_index() if self.cuda else None
        reader = NvmlReader([] if self.nvml_index is None else [self.nvml_index], nvml)
        self.sampler = Sampler(reader, sample_hz, self._allocator_now)
        self.allocated_peak = self.reserved_peak = self.building_peak = 0
        self.before: int | None = None
        self.context: int | None = None
        self.base_host = 0
        self._outside_after_building: int | None = None

    def start(self) -> None:
        """Begin to sample, and open the device: its context is what the driver then has in use more than before."""
        opened = self.cuda and torch.cuda.is_initialized()
        self.sampler.start()
        first = self.sampler.samples[0]
        self.base_host = first.host
        if not self.cuda:
            return
        index = self.nvml_index
        if opened:
            self._notes.append(
                "CUDA was in use before the profiler started: its context is not told from what else the driver "
                "had in use. Start the profiler first"
            )
            own = first.process_used.get(index) if index is not None else None
            self.before = 0 if own is None or index is None else first.device_used[index] - own
            self.context = 0
        else:
            open_device(self.device)
            opened_now = self.sampler.sample()
            outside = self._outside(opened_now)
            if index is not None and index in first.device_used and outside is not None:
                self.before = first.device_used[index]
                self.context = outside - self.before
        torch.cuda.reset_peak_memory_stats(self.device)

    def built(self, optimizer: Any) -> None:
        """Model and optimizer are there: what comes from now on is of the training."""
        if not self.cuda:
            return
        self._open_communicators(optimizer)
        self._outside_after_building = self._outside(self.sampler.sample())
        self.read_and_reset()
        self.building_peak, self.allocated_peak = self.allocated_peak, 0

    def read_and_reset(self) -> tuple[int, int, int]:
        """(allocated, its peak since the last call, reserved) by the allocator, on a GPU."""
        stats = torch.cuda.memory_stats_as_nested_dict(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
        self.allocated_peak = max(self.allocated_peak, allocated["peak"])
        self.reserved_peak = max(self.reserved_peak, reserved["peak"])
        return allocated["current"], allocated["peak"], reserved["peak"]

    def joules(self) -> float | None:
        """What the device has used up so far, by all processes; None where nobody counts it."""
        return None if self.nvml_index is None else self.sampler.joules(self.nvml_index)

    def communication(self) -> int | None:
        """Taken from the driver while the communicators were made; None where that is not known, or there are none."""
        if self._outside_after_building is None or self.context is None or self.before is None or not several_ranks():
            return None
        return self._outside_after_building - self.before - self.context

    def _find_nvml_index(self) -> int | None:
        try:
            return torch.cuda._get_nvml_device_index(self.device)
        except Exception as error:  # torch raises RuntimeError, ValueError or NVML's own
            self._notes.append(
                f"NVML: torch cannot say which physical device {self.device} is ({error}); no driver figures"
            )
            return None

    def _allocator_now(self) -> tuple[int, int] | None:
        if not self.cuda or not torch.cuda.is_initialized():
            return None
        stats = torch.cuda.memory_stats_as_nested_dict(self.device)
        return stats["allocated_bytes"]["all"]["current"], stats["reserved_bytes"]["all"]["current"]

    def _outside(self, sample: Sample) -> int | None:
        """In use on the device and not reserved by the allocator."""
        used = sample.device_used.get(self.nvml_index) if self.nvml_index is not None else None
        return None if used is None or sample.allocator is None else used - sample.allocator[1]

    def _open_communicators(self, optimizer: Any) -> None:
        """NCCL connects when it is first used; let that be now, so that what it takes can be told."""
        if not several_ranks() or "nccl" not in str(dist.get_backend()):
            return
        own = getattr(optimizer, "dp_process_group", None)
        for group in [None] if own is None else [None, own]:
            ranks = dist.get_world_size(group)
            small, large = (torch.zeros(n * 256, device=self.device) for n in (1, ranks))
            dist.all_reduce(small, group=group)
            dist.all_gather_into_tensor(large, small, group=group)
            dist.reduce_scatter_tensor(small, large, group=group)
        torch.cuda.synchronize(self.device)


def open_device(device: torch.device) -> None:
    """Make the CUDA context, and the allocator's first segment with it."""
    torch.empty(1, device=device)
    torch.cuda.synchronize(device)


def default_device() -> torch.device:
    """The CUDA device of LOCAL_RANK, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def this_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
