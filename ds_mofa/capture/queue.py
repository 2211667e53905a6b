"""Linears whose sketches wait to be taken together, on a GPU."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ds_mofa.kernels import triton_serves
from ds_mofa.phases import phase

__all__ = ["Queue"]


class Queue:
    """Takes the sketches of several linears in a few kernel launches, where each alone would need four.

    It keeps their activations and output gradients alive until then, at most ``BYTES``. The rest is taken when the
    backward ends.
    """

    COUNT = 16
    BYTES = 200_000_000

    def __init__(self, rank: int, dtype: torch.dtype):
        self._rank, self._dtype = rank, dtype
        self._waiting: list[tuple] = []
        self._sketches: set[tuple] = set()  # addresses of what waits
        self._bytes = 0
        self._backward = -1  # of the last that came

    @classmethod
    def serving(cls, working: Tensor, sketches: Tensor, rank: int) -> "Queue | None":
        """One for sketches of this dtype and device, or None where each linear is taken at once."""
        kernels = triton_serves(working) and working.dtype in (torch.bfloat16, torch.float16)
        return cls(rank, working.dtype) if kernels and sketches.dtype == torch.float32 else None

    def add(self, addresses: tuple[int, int, int, int], x: Tensor, dy: Tensor) -> None:
        """Sketch dy^T x later; within a backward.

        Args:
            addresses: of Y, Z, U and V.
            x: (..., n), contiguous, in the queue's dtype.
            dy: (..., m), likewise.
        """
        if x.numel() == 0:  # an expert that no token went to
            return
        backward = torch._C._current_graph_task_id()
        if not self._waiting or backward != self._backward:
            self.flush()  # left by a backward that raised: autograd keeps what such a one has added
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self.flush)
        self._let_wait(addresses, x, dy)

    def take(self, work: Iterable[tuple[tuple[int, int, int, int], Tensor, Tensor]]) -> None:
        """:meth:`add` of these, and :meth:`flush`: for tensors whose memory is someone else's next, as in compiled code."""
        for addresses, x, dy in work:
            if x.numel():
                self._let_wait(addresses, x, dy)
        self.flush()

    def _let_wait(self, addresses: tuple[int, int, int, int], x: Tensor, dy: Tensor) -> None:
        if addresses in self._sketches:  # of a linear that is used again: one launch would add both to the same old sum
            self.flush()
        self._waiting.append((addresses, x, dy))
        self._sketches.add(addresses)
        self._bytes += (x.numel() + dy.numel()) * x.element_size()
        if len(self._waiting) >= self.COUNT or self._bytes >= self.BYTES:
            self.flush()

    def flush(self) -> None:
        """Take the sketches of all that wait."""
        if self._waiting:
            waiting = self._waiting
            self.clear()
            self.launch(waiting)

    def launch(self, work: list[tuple[tuple[int, int, int, int], Tensor, Tensor]]) -> None:
        """Take these, no two of which are of one sketch."""
        from ds_mofa.kernels import _capture

        with phase("capture"):
            _capture.launch(work, self._rank, self._dtype)

    def clear(self) -> None:
        """Drop what waits."""
        self._waiting, self._sketches, self._bytes = [], set(), 0
