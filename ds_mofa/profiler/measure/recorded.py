"""The one step whose allocations are recorded one by one, and what they say."""

import pickle
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_mofa.profiler.measure.curve import Curve, Span, curve, label
from ds_mofa.profiler.measure.history import CudaHistory
from ds_mofa.profiler.measure.inventory import Known, buckets, inventory, leaves, tensors
from ds_mofa.profiler.measure.layers import LayerMark, after_each_layer, matrix_gradients
from ds_mofa.profiler.measure.peak import at_peak
from ds_mofa.profiler.storages import Allocation, StorageTracker

__all__ = ["RecordedStep"]


class RecordedStep:
    """The history of one step between :meth:`begin` and :meth:`end`.

    Args:
        device: whose allocations.
        stacks: with the Python stack of each.

    Attributes:
        going_on: whether it has begun and not ended.
        allocations: all of that step, once it has ended; None before.
        seconds: what the profiler itself has taken in it, once it has ended.
    """

    def __init__(self, device: torch.device, stacks: bool):
        self._device, self._stacks = device, stacks
        self.going_on = False
        self.allocations: list[Allocation] | None = None
        self._history: CudaHistory | None = None
        self._tracker: StorageTracker | None = None
        self._marks: list[tuple[int, list[Known]]] = []
        self._layer_marks: list[LayerMark] = []
        self._times = (0, 0)
        self._model: nn.Module | None = None
        self._optimizer: Any = None

    def begin(self, model: nn.Module | None, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer
        if self._device.type == "cuda":
            torch.cuda.profiler.start()  # Nsight's capture range
            self._history = CudaHistory(self._device, self._stacks)
            self._history.start()
        else:
            self._tracker = StorageTracker(_storages(model, optimizer), stacks=self._stacks)
            self._tracker.__enter__()
        self.going_on = True
        self._times = (time.time_ns(), 0)
        self.mark()

    def end(self, snapshot: Path | None = None) -> None:
        """``snapshot``: a file for the allocator's own history."""
        self.mark()
        self.going_on = False
        end = time.time_ns()
        if self._history is not None:
            self.allocations = self._history.stop()
            torch.cuda.profiler.stop()
            if snapshot is not None:
                snapshot.parent.mkdir(parents=True, exist_ok=True)
                with open(snapshot, "wb") as file:
                    pickle.dump(self._history.snapshot, file)
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)
            self.allocations = self._tracker.allocations + [
                Allocation(known.address, known.size, 0) for known in self._marks[0][1] if known.device == "cpu"
            ]
        self._history = self._tracker = None
        self._times = (self._times[0], end)

    def forget(self) -> None:
        """It was begun, and then there was no such step."""
        self.allocations = None

    def mark(self) -> None:
        """What is what now: at each boundary of two phases."""
        if self.going_on:
            self._marks.append((time.time_ns(), inventory(self._model, self._optimizer)))

    def layer_done(self, name: str, grad: Tensor) -> None:
        """The end of a layer's backward, ``grad`` being of its input."""
        if self.going_on and self._model is not None:  # it may have ended since forward
            moment = time.time_ns()
            address, held = grad.untyped_storage().data_ptr(), matrix_gradients(self._model)
            self._layer_marks.append(LayerMark(name, moment, address, held))
            self._marks.append((moment, buckets(self._model, self._optimizer)))

    def curve(self, spans: list[Span]) -> Curve | None:
        """What was alive over the step, each allocation labelled by ``spans``, its phases; None without a history."""
        if self.allocations is None:
            return None
        label(self.allocations, self._marks, spans, self._device.type)
        return curve(self.allocations, *self._times)

    def phase_peaks(self, spans: list[Span], inner: list[Span]) -> list[dict[str, Any]]:
        """The breakdown at the peak of each phase, after :meth:`curve`; of the largest, where it came several times."""
        if self.allocations is None:
            return []
        best: dict[str, Curve] = {}
        largest: dict[str, int] = {}
        by_name: dict[str, list[Span]] = {}
        for span in inner:
            by_name.setdefault(span.name, []).append(span)
        chosen = list(spans)
        for some in by_name.values():  # hundreds of captures: the last few are like the others
            chosen += some[-4:]
        for span in chosen:
            part = curve(self.allocations, span.start, span.end)
            total = sum(part.peak.values())
            if total > largest.get(span.name, -1):
                best[span.name], largest[span.name] = part, total
        return [{"name": name, "allocated": largest[name], "breakdown": best[name].peak} for name in best]

    def peak(self, curve: Curve | None, spans: list[Span]) -> dict[str, Any] | None:
        """What stood at the peak of a :meth:`curve`; see :func:`at_peak`."""
        return None if curve is None or self.allocations is None else at_peak(self.allocations, curve, spans)

    def layers(self, spans: list[Span]) -> list[dict[str, Any]]:
        """What is alive after the backward of each layer, after :meth:`curve`."""
        if self.allocations is None or not self._layer_marks or self._model is None:
            return []
        return after_each_layer(self.allocations, self._layer_marks, spans, self._model)


def _storages(model: nn.Module | None, optimizer: Any) -> list[Tensor]:
    """Tensors whose storages an inventory counts, for the tracker to leave alone."""
    return [leaf for _, item in tensors(model, optimizer) for leaf in leaves(item)]
