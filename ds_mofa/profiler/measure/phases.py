"""Who is at work: phases from the optimizer's own announcements, from hooks on the model, and from a wrapped ``step``.

Forward and backward come from hooks; capture, reduce, factor update, gather, apply and AdamW from
:mod:`ds_mofa.phases`; the step of any other optimizer is one phase. Each phase is an NVTX range of the same name.
Nothing here waits for the device: the allocator works on the host's time.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.phases import PHASES, listening
from ds_mofa.profiler.measure.curve import Span

__all__ = ["PhaseRecorder", "watch_model", "watch_optimizer", "ALL_PHASES"]

ALL_PHASES = ("forward", "backward", *PHASES, "optimizer step")

# Hundreds in a step: timed and named for Nsight, their memory taken from the allocator's history alone.
_FINE = {"capture"}


class PhaseRecorder:
    """A :class:`ds_mofa.phases.Listener` that adds up what each phase did.

    Args:
        meter: gives (allocated, peak allocated since the last reset, reserved) in bytes and resets the peak;
            None on a CPU, where no allocator keeps such figures.
        host: gives the resident set in bytes.
        nvtx: whether to open NVTX ranges.

    Attributes:
        statistics: by phase, ``count``, ``seconds`` (host time, inner phases included), ``peak_allocated``,
            ``peak_reserved`` and ``peak_host`` in bytes (0 where not measured).
        spans: the phases of the step being recorded in detail; nested ones are in ``inner``.
        cost: seconds spent in here.
    """

    def __init__(self, meter: Callable[[], tuple[int, int, int]] | None, host: Callable[[], int], nvtx: bool):
        self._meter, self._host, self._nvtx = meter, host, nvtx
        self.statistics: dict[str, dict[str, float]] = {}
        self.spans: list[Span] = []
        self.inner: list[Span] = []
        self.detail = False
        self.at_boundary: Callable[[], None] = lambda: None
        self.cost = 0.0
        self.active = True
        self._stack: list[tuple[str, int, Any]] = []

    def enter(self, name: str) -> None:
        if not self.active:
            return
        began = time.perf_counter()
        if name not in _FINE:
            self._read(None)
        # Ranges that one thread opens and another closes, as autograd's do, need a handle.
        handle = torch.cuda.nvtx.range_start(name) if self._nvtx else None
        self._stack.append((name, time.time_ns(), handle))
        self.cost += time.perf_counter() - began

    def leave(self, name: str) -> None:
        if not self._stack or self._stack[-1][0] != name:
            return  # entered before the recorder was, or in a pause
        began = time.perf_counter()
        if name not in _FINE:
            self._read(name)
        _, start, handle = self._stack.pop()
        end = time.time_ns()
        if handle is not None:
            torch.cuda.nvtx.range_end(handle)
        entry = self._entry(name)
        entry["count"] += 1
        entry["seconds"] += (end - start) / 1e9
        if self.detail:
            (self.inner if self._stack else self.spans).append(Span(name, start, end))
        self.cost += time.perf_counter() - began

    @property
    def current(self) -> str | None:
        """The innermost phase that has begun and not ended."""
        return self._stack[-1][0] if self._stack else None

    def reset(self) -> None:
        """Forget phases that an error has left open."""
        self._stack.clear()

    def between(self) -> None:
        """Read what happened since the last boundary, outside all phases or in the current one."""
        if self.active:
            self._read(None)

    def _entry(self, name: str) -> dict[str, float]:
        if name not in self.statistics:
            zero = {"count": 0, "seconds": 0.0, "peak_allocated": 0, "peak_reserved": 0, "peak_host": 0}
            self.statistics[name] = zero
        return self.statistics[name]

    def _read(self, leaving: str | None) -> None:
        """Charge the peak since the last reading to the phase at the top; an outer one gets its inner ones' too."""
        host = peak = reserved = 0
        if self._meter is not None:
            _, peak, reserved = self._meter()
        else:  # beside a device the sampler's readings of the host are enough
            host = self._host()
        names = {name for name, *_ in self._stack} or {"between phases"}
        for name in names:
            entry = self._entry(name)
            entry["peak_allocated"] = max(entry["peak_allocated"], peak)
            entry["peak_reserved"] = max(entry["peak_reserved"], reserved)
            entry["peak_host"] = max(entry["peak_host"], host)
        if self.detail:
            self.at_boundary()

    def listening(self):
        """Context in which the optimizers' announcements are heard."""
        return listening(self)


def watch_model(model: nn.Module, recorder: PhaseRecorder) -> list[Callable[[], None]]:
    """Announce forward and backward of ``model``; returns what undoes it.

    Backward begins when the gradient of the loss, or of anything else that the model gives out, is known, and ends when
    autograd has run everything it was asked for.
    """

    def before(module, args) -> None:
        if torch.is_grad_enabled():
            recorder.enter("forward")

    def after(module, args, output) -> None:
        if not torch.is_grad_enabled():
            return
        recorder.leave("forward")
        begun = False

        def backward_begins(grad: Tensor) -> None:
            nonlocal begun
            if not begun:
                begun = True
                recorder.enter("backward")
                torch.autograd.Variable._execution_engine.queue_callback(backward_ends)

        def backward_ends() -> None:
            nonlocal begun
            begun = False
            recorder.leave("backward")

        for tensor in _tensors_in(output):  # some trainers make a loss of their own from the others
            if tensor.requires_grad:
                tensor.register_hook(backward_begins)

    handles = [
        model.register_forward_pre_hook(before),
        model.register_forward_hook(after),
    ]
    return [handle.remove for handle in handles]


def _tensors_in(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from _tensors_in(value)
    elif isinstance(item, list | tuple):
        for value in item:
            yield from _tensors_in(value)


def watch_optimizer(optimizer: Any, recorder: PhaseRecorder) -> list[Callable[[], None]]:
    """Announce the step of an optimizer that does not announce its own; returns what undoes it."""
    if optimizer is None or hasattr(optimizer, "mofa") or isinstance(optimizer, MatrixOptimizer):
        return []
    base = getattr(optimizer, "optimizer", optimizer)  # inside DeepSpeed's
    name = "AdamW" if "adam" in type(base).__name__.lower() else "optimizer step"
    if isinstance(optimizer, torch.optim.Optimizer):
        handles = [
            optimizer.register_step_pre_hook(lambda *_: recorder.enter(name)),
            optimizer.register_step_post_hook(lambda *_: recorder.leave(name)),
        ]
        return [handle.remove for handle in handles]
    step = optimizer.step

    @functools.wraps(step)
    def announced(*args, **kwargs):
        recorder.enter(name)
        try:
            return step(*args, **kwargs)
        finally:
            recorder.leave(name)

    optimizer.step = announced

    def undo() -> None:
        if optimizer.__dict__.get("step") is announced:
            del optimizer.step

    return [undo]
