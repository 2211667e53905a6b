"""``MemoryProfiler``: meters, phases and history around a training loop, and the report of one run."""

import contextlib
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_mofa.profiler import layers, trace
from ds_mofa.profiler.accounting import account, thin_curve, thin_samples
from ds_mofa.profiler.inventory import Known, buckets, inventory, leaves, sizes, tensors, unwrap_optimizer
from ds_mofa.profiler.phases import PhaseRecorder, watch_model, watch_optimizer
from ds_mofa.profiler.predict import on_host
from ds_mofa.profiler.report import assemble, write_report
from ds_mofa.profiler.sampler import NvmlReader, Sampler

__all__ = ["MemoryProfiler"]


class MemoryProfiler:
    """Where the memory of a training run goes.

    >>> with MemoryProfiler(output_dir="out/memory") as profiler:   # before the model is built
    ...     model, optimizer = build()
    ...     profiler.watch(model, optimizer)
    ...     for batch in data:
    ...         model(**batch).loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         profiler.step()

    At the end ``output_dir`` holds report.json, report.md, report.html and a PNG of each figure, written by rank 0 for
    all ranks. Without a CUDA device the host's memory is measured, and the report says so.

    Args:
        model, optimizer: as for :meth:`watch`, where they exist already; what they have allocated before the start is
            then still counted, but the CUDA context cannot be told from what the driver had in use before.
        output_dir: folder of the report.
        sample_hz: readings of NVML and the host a second.
        detail_step: which call of :meth:`step` ends the step whose allocations are recorded one by one: that one gives
            the breakdown. The second by default (1): optimizer states exist then.
        stacks: record with each of them the Python stack that made it. Slows that step.
        memory_snapshot: also write that step's history for https://pytorch.org/memory_viz; implies ``stacks``.
        device: by default the CUDA device of LOCAL_RANK, or the CPU.
        setting: what was run, for the report: anything that JSON takes.
        predicted: a prediction of :func:`ds_mofa.profiler.predict.predict` to stand beside what is measured.
        nvml: a stand-in for pynvml.

    Raises:
        ValueError: ``sample_hz`` or ``detail_step`` out of range.

    The allocator's peak is reset at each phase: ``torch.cuda.max_memory_allocated`` then covers the last phase alone;
    :attr:`peak_allocated` covers the run.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Any = None,
        *,
        output_dir: str | Path = "out/memory",
        sample_hz: float = 20.0,
        detail_step: int = 1,
        stacks: bool = False,
        memory_snapshot: bool = False,
        device: torch.device | str | None = None,
        setting: dict[str, Any] | None = None,
        predicted: dict[str, Any] | None = None,
        nvml: ModuleType | Any | None = None,
    ):
        if detail_step < 0:
            raise ValueError(f"detail_step is {detail_step}: give the number of a step, 0 or above")
        self.output_dir, self.detail_step = Path(output_dir), detail_step
        self.stacks, self.memory_snapshot = stacks or memory_snapshot, memory_snapshot
        self.setting, self.predicted = dict(setting or {}), predicted
        self.notes: list[str] = []
        self.report: dict[str, Any] | None = None
        self.steps = 0
        self.step_seconds: list[float] = []
        self._device = torch.device(device) if device is not None else _default_device()
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._model, self._optimizer = model, optimizer

        self._nvml_index = None
        if self._cuda:
            self._nvml_index = self._find_nvml_index()
        else:
            self.notes.append("No CUDA device: these are figures of the host's memory, of this process (resident set).")
            if predicted:
                self.predicted = on_host(predicted)
            if memory_snapshot:
                self.notes.append("No memory snapshot: PyTorch keeps such a history on CUDA devices alone.")
        reader = NvmlReader([] if self._nvml_index is None else [self._nvml_index], nvml)
        self._sampler = Sampler(reader, sample_hz, self._allocator_now)
        self._recorder = PhaseRecorder(
            self._read_and_reset if self._cuda else None, lambda: self._process.memory_info().rss, nvtx=self._cuda
        )
        self._process = psutil.Process()
        self._undo, self._listening = contextlib.ExitStack(), contextlib.ExitStack()
        self._history: Any = None
        self._allocations: list[trace.Allocation] | None = None
        self._marks: list[tuple[int, list[Known]]] = []
        self._layer_marks: list[layers.LayerMark] = []
        self._detail_times = (0, 0)
        self._known: list[Known] = []
        self._step_range = None
        self._reserved_peak = self._allocated_peak = self._building_peak = 0
        self._before = self._context = self._outside_after_watch = None
        self._base_host = 0
        self._cost_before = self._detail_cost = 0.0
        self._started = self._running = False

    @property
    def _cuda(self) -> bool:
        return self._device.type == "cuda"

    @property
    def running(self) -> bool:
        """Between :meth:`start` and :meth:`stop`."""
        return self._running

    @property
    def peak_allocated(self) -> int:
        """Bytes: the allocator's peak of the training, or of building the model before; 0 on a CPU."""
        if self._cuda and self._running:
            self._recorder.between()
        return self._allocated_peak or self._building_peak

    # ------------------------------------------------------------------ the run

    def __enter__(self) -> "MemoryProfiler":
        return self.start()

    def __exit__(self, kind, *_) -> None:
        self.stop(failed=kind is not None)

    def start(self) -> "MemoryProfiler":
        """Begin to sample; opens the CUDA device, whose context is what the driver then has in use more than before."""
        if self._started:
            raise RuntimeError("this MemoryProfiler has been started already: make a new one for each run")
        self._started = self._running = True
        opened = self._cuda and torch.cuda.is_initialized()
        self._sampler.start()
        first = self._sampler.samples[0]
        self._base_host = first.host
        if self._cuda:
            if opened:
                self.notes.append(
                    "CUDA was in use before the profiler started: its context is not told from what else the driver "
                    "had in use. Start the profiler first"
                )
                self._before = (
                    0
                    if first.process_used.get(self._nvml_index) is None
                    else (first.device_used[self._nvml_index] - first.process_used[self._nvml_index])
                )
                self._context = 0
            else:
                _open(self._device)
                opened_now = self._sampler.sample()
                if first.device_used and opened_now.device_used:
                    self._before = first.device_used[self._nvml_index]
                    self._context = self._outside(opened_now) - self._before
            torch.cuda.reset_peak_memory_stats(self._device)
        self._listening.enter_context(self._recorder.listening())
        if self._model is not None:
            self.watch(self._model, self._optimizer)
        return self

    def watch(self, model: nn.Module, optimizer: Any = None) -> None:
        """Attach to a model and its optimizer, once both are built. On several GPUs every rank must call it.

        Args:
            model: the module whose forward is called, or a DeepSpeed engine.
            optimizer: of torch, of ds_mofa, of DeepSpeed or Accelerate; an engine's own is found.

        Raises:
            RuntimeError: the profiler is not running, or watches a model already.
        """
        if not self._running:
            raise RuntimeError("watch() outside the profiler: call start() first, or use it as a context manager")
        if self._known:
            raise RuntimeError("watch() was called twice: one MemoryProfiler watches one model")
        optimizer = optimizer if optimizer is not None else getattr(model, "optimizer", None)
        if hasattr(model, "module") and hasattr(model, "backward"):  # a DeepSpeed engine
            model = model.module
        self._model, self._optimizer = model, unwrap_optimizer(optimizer)
        self._known = inventory(self._model, self._optimizer)
        for undo in [
            *watch_model(model, self._recorder),
            *watch_optimizer(self._optimizer, self._recorder),
            *layers.watch_layers(model, self._layer_done, wanted=lambda: self._recorder.detail),
        ]:
            self._undo.callback(undo)
        self._recorder.at_boundary = self._mark
        if self._cuda:
            self._open_communicators()
            self._outside_after_watch = self._outside(self._sampler.sample())
            self._read_and_reset()
            self._building_peak, self._allocated_peak = self._allocated_peak, 0
        self._step_started = time.perf_counter()
        self._begin_step()

    def step(self) -> None:
        """Call at the end of every optimizer step, after ``zero_grad``."""
        if not self._known:
            raise RuntimeError("step() before watch(model, optimizer): the profiler does not know what to look at")
        self._end_step()
        now = time.perf_counter()
        if self.steps == self.detail_step:
            self._detail_cost = self._recorder.cost - self._cost_before
        elif self._recorder.active:
            self.step_seconds.append(now - self._step_started)
        self.steps += 1
        self._step_started = time.perf_counter()
        self._begin_step()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within: no phases, no history; only the sampler goes on. For measuring what the profiler itself costs."""
        self._recorder.active = False
        self._listening.close()
        try:
            yield
        finally:
            self._listening.enter_context(self._recorder.listening())
            self._recorder.active = True

    def stop(self, failed: bool = False) -> dict[str, Any] | None:
        """End everything, merge the ranks and write the report; every rank must call it.

        Args:
            failed: the run ended in an error: the ranks are not merged, and each writes what it has.

        Returns:
            The report, on rank 0; None on the others.
        """
        if not self._running:
            return self.report
        if self._history is not None:
            self._end_detail()
            if not self._recorder.spans:  # begun, and then there was no such step
                self._allocations = None
        if self._step_range is not None:
            torch.cuda.nvtx.range_end(self._step_range)
        self._recorder.between()
        self._known = inventory(self._model, self._optimizer) if self._model is not None else []
        self._running = False
        self._undo.close()
        self._listening.close()
        self._sampler.stop()
        mine = self._rank_report()
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
        everyone = [mine]
        if ranks > 1 and not failed:
            everyone = [None] * ranks
            dist.all_gather_object(everyone, mine)
        elif ranks > 1:
            mine["notes"].append("The run failed; this report is of one rank.")
            self.output_dir = self.output_dir / f"rank{rank}"
        if rank and not failed:
            return None
        self.report = assemble(everyone, self.setting, self.predicted)
        write_report(self.report, self.output_dir)
        return self.report

    # ------------------------------------------------------------------ steps and the detailed one

    def _begin_step(self) -> None:
        self._recorder.reset()
        if self._cuda and self._recorder.active:
            self._step_range = torch.cuda.nvtx.range_start(f"step {self.steps}")
        if self.steps == self.detail_step and self._recorder.active:
            self._begin_detail()

    def _end_step(self) -> None:
        self._recorder.between()
        if self._history is not None:
            self._end_detail()
        if self._step_range is not None:
            torch.cuda.nvtx.range_end(self._step_range)
            self._step_range = None

    def _begin_detail(self) -> None:
        if self._cuda:
            torch.cuda.profiler.start()  # Nsight's capture range
            self._history = trace.CudaHistory(self._device, self.stacks)
            self._history.start()
        else:
            self._history = trace.StorageTracker(_storages(self._model, self._optimizer))
            self._history.__enter__()
        self._cost_before = self._recorder.cost
        self._recorder.detail = True
        self._detail_times = (time.time_ns(), 0)
        self._mark()

    def _end_detail(self) -> None:
        self._mark()
        self._recorder.detail = False
        end = time.time_ns()
        history, self._history = self._history, None
        if self._cuda:
            self._allocations = history.stop()
            torch.cuda.profiler.stop()
            if self.memory_snapshot:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                rank = dist.get_rank() if _distributed() else 0
                with open(self.output_dir / f"snapshot_rank{rank}.pickle", "wb") as file:
                    pickle.dump(history.snapshot, file)
            history.snapshot = None
        else:
            history.__exit__(None, None, None)
            self._allocations = history.allocations + [
                trace.Allocation(known.address, known.size, 0) for known in self._marks[0][1] if known.device == "cpu"
            ]
        self._detail_times = (self._detail_times[0], end)

    def _mark(self) -> None:
        if self._recorder.detail:
            self._marks.append((time.time_ns(), inventory(self._model, self._optimizer)))

    def _layer_done(self, name: str, grad: Tensor) -> None:
        if self._recorder.detail:  # it may have ended since forward
            moment = time.time_ns()
            address, held = grad.untyped_storage().data_ptr(), layers.matrix_gradients(self._model)
            self._layer_marks.append(layers.LayerMark(name, moment, address, held))
            self._marks.append((moment, buckets(self._model, self._optimizer)))

    # ------------------------------------------------------------------ meters

    def _find_nvml_index(self) -> int | None:
        try:
            return torch.cuda._get_nvml_device_index(self._device)
        except Exception as error:  # torch raises RuntimeError, ValueError or NVML's own
            self.notes.append(
                f"NVML: torch cannot say which physical device {self._device} is ({error}); no driver figures"
            )
            return None

    def _allocator_now(self) -> tuple[int, int] | None:
        if not self._cuda or not torch.cuda.is_initialized():
            return None
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        return stats["allocated_bytes"]["all"]["current"], stats["reserved_bytes"]["all"]["current"]

    def _read_and_reset(self) -> tuple[int, int, int]:
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
        self._allocated_peak = max(self._allocated_peak, allocated["peak"])
        self._reserved_peak = max(self._reserved_peak, reserved["peak"])
        return allocated["current"], allocated["peak"], reserved["peak"]

    def _outside(self, sample) -> int | None:
        """In use on the device and not reserved by the allocator, bytes."""
        used = sample.device_used.get(self._nvml_index)
        return None if used is None or sample.allocator is None else used - sample.allocator[1]

    def _open_communicators(self) -> None:
        """NCCL connects when it is first used; let that be now, so that what it takes can be told."""
        if not _distributed() or dist.get_world_size() == 1 or "nccl" not in str(dist.get_backend()):
            return
        groups = [None]
        own = getattr(self._optimizer, "dp_process_group", None)
        if own is not None:
            groups.append(own)
        for group in groups:
            ranks = dist.get_world_size(group)
            small, large = (torch.zeros(n * 256, device=self._device) for n in (1, ranks))
            dist.all_reduce(small, group=group)
            dist.all_gather_into_tensor(large, small, group=group)
            dist.reduce_scatter_tensor(small, large, group=group)
        torch.cuda.synchronize(self._device)

    # ------------------------------------------------------------------ the report of this rank

    def _rank_report(self) -> dict[str, Any]:
        samples = self._sampler.samples
        index = self._nvml_index
        nvml = [s.device_used[index] for s in samples if index in s.device_used]
        process = [s.process_used[index] for s in samples if index in s.process_used]
        curve = None
        spans = self._recorder.spans
        if self._allocations is not None:
            trace.label(self._allocations, self._marks, spans, self._device.type)
            curve = trace.curve(self._allocations, self._detail_times[0], self._detail_times[1])
        elif self._model is not None:
            self.notes.append(
                f"The run ended after {self.steps} steps, before the one whose allocations are recorded "
                f"({self.detail_step + 1}): activations and temporaries are not told apart. Lower detail_step"
            )
        peaks = {
            "allocated": self._allocated_peak if self._cuda else None,
            "allocated_while_building": self._building_peak if self._cuda else None,
            "reserved": self._reserved_peak if self._cuda else None,
            "traced": sum(curve.peak.values()) if curve is not None else None,
            "nvml_device": max(nvml, default=None),
            "nvml_process": max(process, default=None),
            "host": max(max(s.host for s in samples), *(e["peak_host"] for e in self._recorder.statistics.values()), 0),
        }
        if self._cuda and not nvml:
            self.notes.append("Without NVML's figures the sum ends at what the allocator has reserved.")
        communication = None
        several = _distributed() and dist.get_world_size() > 1
        if self._outside_after_watch is not None and self._context is not None and several:
            communication = self._outside_after_watch - self._before - self._context
        breakdown = account(
            cuda=self._cuda,
            peaks=peaks,
            at_peak=curve.peak if curve is not None else None,
            known=sizes(self._known, self._device.type),
            before=self._before,
            context=self._context,
            communication=communication,
            base_host=self._base_host,
        )
        device = torch.cuda.get_device_name(self._device) if self._cuda else "CPU"
        thread_share = self._sampler.cost / max((samples[-1].time - samples[0].time) / 1e9, 1e-9)
        steps = max(len(self.step_seconds), 1)
        own = self._recorder.cost - self._detail_cost  # the recorded step is not like the others
        return {
            "rank": dist.get_rank() if _distributed() else 0,
            "device": device,
            "driver": self._sampler.reader.driver,
            "measured": "device memory" if self._cuda else "host memory",
            "peaks": peaks,
            "breakdown": breakdown,
            "phases": [
                {"name": name, **{key: value for key, value in entry.items()}}
                for name, entry in self._recorder.statistics.items()
            ],
            "phase_peaks": self._phase_peaks(),
            "layers": self._layer_report(),
            "steps": self.steps,
            "step_seconds": self.step_seconds,
            "sampling": {
                "hz_asked": self._sampler.hz,
                "samples": len(samples),
                "longest_gap_seconds": self._sampler.gap(),
                "thread_cpu_share": thread_share,
            },
            "overhead": {
                "seconds_per_step": own / steps,
                "share_of_step": own / max(sum(self.step_seconds), 1e-9),
            },
            "timeline": thin_samples(samples, index),
            "step_timeline": thin_curve(curve, spans, self._recorder.inner) if curve is not None else None,
            "notes": self.notes + self._sampler.problems,
        }

    def _phase_peaks(self) -> list[dict[str, Any]]:
        """The breakdown at the peak of each phase of the detailed step; of the largest, where it came several times."""
        if self._allocations is None:
            return []
        best: dict[str, trace.Curve] = {}
        largest = {}
        inner = {span.name: [] for span in self._recorder.inner}
        for span in self._recorder.inner:
            inner[span.name].append(span)
        chosen = list(self._recorder.spans)
        for spans in inner.values():  # hundreds of captures: the last few are like the others
            chosen += spans[-4:]
        for span in chosen:
            part = trace.curve(self._allocations, span.start, span.end)
            total = sum(part.peak.values())
            if total > largest.get(span.name, -1):
                best[span.name], largest[span.name] = part, total
        return [{"name": name, "allocated": largest[name], "breakdown": best[name].peak} for name in best]

    def _layer_report(self) -> list[dict[str, Any]]:
        if self._allocations is None or not self._layer_marks:
            return []
        return layers.after_each_layer(self._allocations, self._layer_marks, self._recorder.spans, self._model)


def _open(device: torch.device) -> None:
    """Make the CUDA context, and the allocator's first segment with it."""
    torch.empty(1, device=device)
    torch.cuda.synchronize(device)


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _storages(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Tensors whose storages an inventory counts, for the tracker to leave alone."""
    return [leaf for _, item in tensors(model, optimizer) for leaf in leaves(item)]
