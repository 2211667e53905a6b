"""Tensors of the host on a device, a piece at a time: through two buffers, copied while the last piece is worked on.

On a GPU the copies in and the copies out have a stream each, so that both directions of the bus are busy while the
current stream computes. On a CPU the same code copies at once. What a copy may not overtake is in
:meth:`Staging.passes`; the rest of the package knows of no stream.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["HostMemory", "Staging"]

_ALIGNMENT = 256  # bytes, as the allocator of a GPU gives them: kernels choose their loads by it


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Where offloaded state is allocated.

    Attributes:
        pin: page-locked, if there is a GPU: only then do copies go on beside the computing, at the bus's whole speed.
    """

    pin: bool

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """1-D.

        Raises:
            RuntimeError: the system does not let so much be page-locked.
        """
        if not (self.pin and torch.cuda.is_available()):
            return torch.zeros(numel, dtype=dtype, device="cpu")
        try:
            return torch.zeros(numel, dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"{numel * dtype.itemsize / 1e9:.2f} GB of host memory for offloaded matrices could not be page-locked "
                f'({error}). Raise the limit (ulimit -l), or set "pin_memory": false in offload_optimizer and '
                "offload_param"
            ) from error


class Staging:
    """The way of host tensors to ``device`` and back.

    It holds no memory between two uses.

    Attributes:
        peak: bytes, the most that the buffers have had so far.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._in, self._out = self._new_stream(), self._new_stream()
        self._sent: list[Tensor] = []
        self._last: Any = None  # the event after the last copy out
        self.peak = 0

    def passes(self, pieces: Sequence[Sequence[Tensor]], *, back: bool = False) -> Iterator[list[Tensor]]:
        """Each piece's tensors on the device, in turn; they are gone when the next one is asked for.

        Args:
            pieces: contiguous host tensors. The buffers are twice as large as the largest piece.
            back: copy them back after they have been worked on. Exhaust the iterator then: the last piece goes back
                when the one after it is asked for. The host sees them after :meth:`finish`.
        """
        buffers = self._buffers(pieces)
        compute = self._current()
        # The buffers' last user may still read them in its stream, and the host tensors may still be being written.
        self._in.wait_stream(compute)
        self._in.wait_stream(self._out)
        left: list[Any] = [None, None]  # for each buffer the event after which it may be filled again

        def fetch(number: int) -> tuple[list[Tensor], Any]:
            staged = _views(buffers[number % 2], pieces[number])
            return staged, self._copy(self._in, pieces[number], staged, after=left[number % 2])

        try:
            coming = [fetch(0)] if pieces else []
            for number, piece in enumerate(pieces):
                staged, arrived = coming.pop()
                compute.wait_event(arrived)
                if number + 1 < len(pieces):
                    coming.append(fetch(number + 1))
                yield staged
                left[number % 2] = compute.record_event()
                if back:
                    left[number % 2] = self._last = self._copy(self._out, staged, piece, after=left[number % 2])
        finally:
            # The buffers go back to the allocator, which knows of the current stream alone.
            compute.wait_stream(self._in)
            compute.wait_stream(self._out)

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy a device tensor to the host beside what comes next. Until :meth:`finish`, neither may be written, and
        the host must not read ``target``.
        """
        self._last = self._copy(self._out, [source], [target], after=self._current().record_event())
        self._sent.append(source)  # else its memory would be given away while it is read

    def finish(self) -> None:
        """Wait until the host has all that was sent or has gone back."""
        if self._last is not None:
            self._last.synchronize()
        self._last = None
        self._sent.clear()

    def _buffers(self, pieces: Sequence[Sequence[Tensor]]) -> Tensor:
        room = max((sum(map(_room, piece)) for piece in pieces), default=0)
        buffers = torch.empty(min(2, len(pieces)), room, dtype=torch.uint8, device=self._device)
        self.peak = max(self.peak, buffers.nbytes)
        return buffers

    def _copy(self, stream, sources: Sequence[Tensor], targets: Sequence[Tensor], after):
        """In ``stream``, once ``after`` has happened; the event that they have arrived."""
        with self._within(stream):
            if after is not None:
                stream.wait_event(after)
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=self._on_gpu)
            return stream.record_event()

    def _new_stream(self) -> "_Stream":
        return torch.cuda.Stream(self._device) if self._on_gpu else _Immediate()

    def _current(self) -> "_Stream":
        return torch.cuda.current_stream(self._device) if self._on_gpu else _Immediate()

    def _within(self, stream) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(stream) if self._on_gpu else contextlib.nullcontext()


class _Stream(Protocol):
    """What is asked of a stream of a GPU."""

    def record_event(self) -> Any: ...

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


class _Immediate:
    """The stream of a CPU: what is asked for has been done when the call returns."""

    def record_event(self) -> None: ...

    def wait_event(self, event: None) -> None: ...

    def wait_stream(self, stream: "_Immediate") -> None: ...


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _views(buffer: Tensor, piece: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like those of ``piece`` beside each other in ``buffer``."""
    views, offset = [], 0
    for tensor in piece:
        views.append(buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        offset += _room(tensor)
    return views
