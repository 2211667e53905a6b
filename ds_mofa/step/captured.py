"""The norm and the factor update as CUDA graphs, for one process whose micro-batches are graphs too.

They are hundreds of small kernels: where the host cannot keep up, a step takes as long as launching them does. What they read
of the host is whether it is the first step, and the clip factor, which is a tensor here.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_mofa.partition.layout import SketchSegment
from ds_mofa.step.driver import RuleDriver

__all__ = ["CapturedUpdate"]

logger = logging.getLogger("ds_mofa")


class CapturedUpdate:
    """What a driver does between the reduced sketches and the new state and working copies, as two graphs.

    One later step than the first runs eagerly, in which all is compiled and cached that is to be. If the next cannot be
    captured, they all run eagerly, and a warning says so.

    Args:
        driver: in one process, of a rule that is :attr:`ds_mofa.rules.rule.Rule.capturable`.
        pool: of graphs that run before and after these; temporaries are to come from their memory.
        stream: on which they are captured.
    """

    def __init__(self, driver: RuleDriver, pool: Any, stream: torch.cuda.Stream):
        self._driver, self._pool, self._stream = driver, pool, stream
        self._pending: SketchSegment | None = None
        self._measured: Any = None
        self._square = self._clip = torch.empty(0)
        self._norm: torch.cuda.CUDAGraph | None = None
        self._update: torch.cuda.CUDAGraph | None = None
        self._warm = self._failed = False

    def take(self, reduced: SketchSegment) -> SketchSegment:
        """The reduced sketches where the graphs read them. Not in the pool: other graphs may run before the step."""
        if self._pending is None:
            self._pending = reduced
        else:
            self._pending.copy_(reduced)
        return self._pending

    def ready(self, pending: SketchSegment, step: int) -> bool:
        """Whether :meth:`squared_norm` and :meth:`update` serve this step."""
        return step > 0 and self._warm and not self._failed and pending is self._pending

    def ran_eagerly(self, step: int) -> None:
        """A step has been taken without the graphs."""
        self._warm |= step > 0

    def squared_norm(self, pending: SketchSegment, step: int) -> Tensor:
        """:meth:`RuleDriver.squared_norm` of what was taken, 0-dim, until another graph of the pool is replayed."""
        if self._norm is None:

            def measure() -> None:
                self._square = self._driver.squared_norm(pending, step)
                self._measured = self._driver.measured

            self._norm = self._captured(measure)
            if self._norm is None:
                return self._driver.squared_norm(pending, step)
        self._norm.replay()
        self._driver.recall(self._measured)
        return self._square

    def update(self, step: int, clip: float | Tensor) -> bool:
        """:meth:`RuleDriver.update` from what was taken, :meth:`RuleDriver.publish` and :meth:`RuleDriver.commit`, after
        :meth:`squared_norm`.

        Args:
            step: optimizer steps before this one.
            clip: factor on the gradient, <= 1; a tensor has one element.

        Returns:
            False where that cannot be captured: nothing has changed.
        """
        pending = self._pending
        assert pending is not None  # ready has looked
        if self._update is None:
            self._clip = torch.ones((), device=pending.device)

            def update() -> None:
                self._driver.recall(self._measured)
                new = self._driver.update(pending, step, self._clip)
                self._driver.publish(new)
                self._driver.commit(new)

            self._update = self._captured(update)
            if self._update is None:
                self._driver.recall(self._measured)
                return False
        if isinstance(clip, Tensor):
            self._clip.copy_(clip)
        else:
            self._clip.fill_(clip)
        self._update.replay()
        return True

    def _captured(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(current)
            self._failed = True
            logger.warning(
                "ds_mofa: the factor update cannot be captured in a CUDA graph and goes on without: %s", error
            )
            return None
        return graph
