"""``MemoryProfiler``: meters, phases and history around a training loop, and the report of one run."""

import contextlib
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn

from ds_mofa.profiler.measure import out_of_memory
from ds_mofa.profiler.measure.inventory import Known, inventory, sizes, unwrap_optimizer
from ds_mofa.profiler.measure.layers import watch_layers
from ds_mofa.profiler.measure.meters import Meters, default_device, several_ranks, this_rank
from ds_mofa.profiler.measure.phases import PhaseRecorder, watch_model, watch_optimizer
from ds_mofa.profiler.measure.rank_report import rank_report
from ds_mofa.profiler.measure.recorded import RecordedStep
from ds_mofa.profiler.measure.throughput import Throughput
from ds_mofa.profiler.outside import on_host
from ds_mofa.profiler.report import assemble, write_report
from ds_mofa.profiler.report.rendering import markdown

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
        stacks: record with each of them the Python stack that made it, for the stack at the peak. Slows that step.
        memory_snapshot: also write that step's history for https://pytorch.org/memory_viz; implies ``stacks``.
            When the memory runs out one is written whatever this says, beside a page on what has grown.
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
        stacks: bool = True,
        memory_snapshot: bool = False,
        device: torch.device | str | None = None,
        setting: dict[str, Any] | None = None,
        predicted: dict[str, Any] | None = None,
        nvml: ModuleType | Any | None = None,
    ):
        if detail_step < 0:
            raise ValueError(f"detail_step is {detail_step}: give the number of a step, 0 or above")
        self.output_dir, self.detail_step = Path(output_dir), detail_step
        self.memory_snapshot = memory_snapshot
        self.setting, self.predicted = dict(setting or {}), predicted
        self.predictor: Callable[[tuple[int, int], str], dict[str, Any]] | None = None  # of a callback
        self.notes: list[str] = []
        self.report: dict[str, Any] | None = None
        self.steps = 0
        self.step_seconds: list[float] = []
        own = torch.device(device) if device is not None else default_device()
        if own.type == "cuda" and own.index is None:
            own = torch.device("cuda", torch.cuda.current_device())
        self._cuda = own.type == "cuda"
        self._model, self._optimizer = model, optimizer

        self._meters = Meters(own, sample_hz, nvml, self.notes)
        if not self._cuda:
            self.notes.append("No CUDA device: these are figures of the host's memory, of this process (resident set).")
            if predicted:
                self.predicted = on_host(predicted)
            if memory_snapshot:
                self.notes.append("No memory snapshot: PyTorch keeps such a history on CUDA devices alone.")
        self._sampler = self._meters.sampler
        process = psutil.Process()
        self._recorder = PhaseRecorder(
            self._meters.read_and_reset if self._cuda else None, lambda: process.memory_info().rss, nvtx=self._cuda
        )
        self._throughput = Throughput(self._meters.joules)
        self._recorded = RecordedStep(own, stacks or memory_snapshot)
        self._undo, self._listening = contextlib.ExitStack(), contextlib.ExitStack()
        self._known: list[Known] = []
        self._step_range: Any = None
        self._recorded_shape: tuple[int, int] | None = None
        self._step_started = 0.0
        self._cost_before = self._detail_cost = 0.0
        self._started = self._running = False

    @property
    def running(self) -> bool:
        """Between :meth:`start` and :meth:`stop`."""
        return self._running

    @property
    def peak_allocated(self) -> int:
        """Bytes: the allocator's peak of the training, or of building the model before; 0 on a CPU."""
        if self._cuda and self._running:
            self._recorder.between()
        return self._meters.allocated_peak or self._meters.building_peak

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
        self._meters.start()
        if self._cuda:
            out_of_memory.watch(self)
        self._listening.enter_context(self._recorder.listening())
        if self._model is not None:
            self.watch(self._model, self._optimizer)
        return self

    def watch(self, model: Any, optimizer: Any = None) -> None:
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
            self._throughput.watch(model),
            *watch_layers(model, self._recorded.layer_done, wanted=lambda: self._recorder.detail),
        ]:
            self._undo.callback(undo)
        self._recorder.at_boundary = self._recorded.mark
        self._meters.built(self._optimizer)
        self._step_started = time.perf_counter()
        self._begin_step()

    def step(self) -> None:
        """Call at the end of every optimizer step, after ``zero_grad``."""
        if not self._known:
            raise RuntimeError("step() before watch(model, optimizer): the profiler does not know what to look at")
        self._end_step()
        now = time.perf_counter()
        counted = self.steps != self.detail_step and self._recorder.active
        self._throughput.step(now - self._step_started, counted)
        if self.steps == self.detail_step:
            self._detail_cost = self._recorder.cost - self._cost_before
        elif counted:
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
        if self._recorded.going_on:
            self._end_detail()
            if not self._recorder.spans:
                self._recorded.forget()
        self._end_range()
        self._recorder.between()
        self._known = inventory(self._model, self._optimizer) if self._model is not None else []
        self._running = False
        out_of_memory.forget(self)
        self._undo.close()
        self._listening.close()
        self._sampler.stop()
        everyone = [self._report_of_this_rank()]
        if several_ranks() and not failed:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, everyone[0])
            everyone = gathered
        elif several_ranks():
            everyone[0]["notes"].append("The run failed; this report is of one rank.")
            self.output_dir = self.output_dir / f"rank{this_rank()}"
        if this_rank() and not failed:
            return None
        self._predict(failed)
        self.report = assemble(everyone, self.setting, self.predicted)
        write_report(self.report, self.output_dir)
        return self.report

    def _predict(self, failed: bool) -> None:
        """The prediction that was left for the end, since it is of the largest forward that has been."""
        shape = self._throughput.shape
        if self.predictor is None or self.predicted is not None or failed or shape is None:
            return
        found = self.predictor(shape, self._throughput.loss)
        if "error" in found:
            self.notes.append(f"No prediction beside these figures: {found['error']}")
        else:
            self.predicted = found if self._cuda else on_host(found)

    def _report_of_this_rank(self) -> dict[str, Any]:
        if self._recorded.allocations is None and self._model is not None:
            self.notes.append(
                f"The run ended after {self.steps} steps, before the one whose allocations are recorded "
                f"({self.detail_step + 1}): activations and temporaries are not told apart. Lower detail_step"
            )
        own = self._recorder.cost - self._detail_cost  # the recorded step is not like the others
        card = torch.cuda.get_device_name(self._meters.device) if self._cuda else "CPU"
        return rank_report(
            self._meters, self._recorder, self._recorded, self._known, self.step_seconds, self.steps, own, self.notes,
            self._throughput.report(self._model, card),
        )  # fmt: skip

    # ------------------------------------------------------------------ the memory runs out

    def out_of_memory(self, device: int, asked: int, free: int) -> None:
        """Write what has grown, and the allocator's blocks for memory_viz; see :mod:`.out_of_memory`."""
        if not self._running or device != self._meters.device.index:
            return
        known = sizes(inventory(self._model, self._optimizer), "cuda") if self._model is not None else {}
        now = out_of_memory.gathered_up(known, torch.cuda.memory_allocated(device))
        before, of, shape = out_of_memory.gathered_up(sizes(self._known, "cuda")), "the beginning of the training", None
        recorded = self._recorded.curve(self._recorder.spans)
        if recorded is not None:
            before, of = out_of_memory.gathered_up(recorded.peak), f"the peak of step {self.detail_step}"
            shape = self._recorded_shape
        grown, document = out_of_memory.explain(
            step=self.steps, phase=self._recorder.current, asked=asked, free=free, now=now, before=before, of=of,
            shapes=(shape, self._throughput.shape),
        )  # fmt: skip
        self.output_dir.mkdir(parents=True, exist_ok=True)
        page = self.output_dir / f"out_of_memory_rank{this_rank()}.md"
        page.write_text(markdown(document, pictures=False), encoding="utf-8")
        self.notes.append(f"The memory ran out in step {self.steps}; {grown} have grown most: see {page.name}")
        print(
            f"ds_mofa: out of memory, rank {this_rank()}: {document.subtitle} See {page}", file=sys.stderr, flush=True
        )
        with open(page.with_suffix(".pickle"), "wb") as file:
            pickle.dump(torch.cuda.memory._snapshot(device), file)

    # ------------------------------------------------------------------ steps and the recorded one

    def _begin_step(self) -> None:
        self._recorder.reset()
        if self._cuda and self._recorder.active:
            self._step_range = torch.cuda.nvtx.range_start(f"step {self.steps}")
        if self.steps == self.detail_step and self._recorder.active:
            self._cost_before = self._recorder.cost
            self._recorder.detail = True
            self._recorded.begin(self._model, self._optimizer)

    def _end_step(self) -> None:
        self._recorder.between()
        if self._recorded.going_on:
            self._end_detail()
        self._end_range()

    def _end_detail(self) -> None:
        self._recorder.detail = False
        self._recorded_shape = self._throughput.shape
        snapshot = self.output_dir / f"snapshot_rank{this_rank()}.pickle"
        self._recorded.end(snapshot if self.memory_snapshot else None)

    def _end_range(self) -> None:
        if self._step_range is not None:
            torch.cuda.nvtx.range_end(self._step_range)
            self._step_range = None
