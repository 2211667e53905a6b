"""The queue of a GPU where there is none."""

from collections.abc import Sequence

from ds_mofa.capture.queue import Queue
from ds_mofa.capture.sketch import Sketch

__all__ = ["QueueOnACPU"]


class QueueOnACPU(Queue):
    """A GPU's, without its kernels: as in those, all programs of a launch have read the sums before one of them writes."""

    def __init__(self, sketches: Sequence[Sketch]):
        super().__init__(sketches[0].V.shape[-1], sketches[0].V.dtype)
        self.of = {sketch.addresses: sketch for sketch in sketches}
        self.sizes: list[int] = []
        for sketch in sketches:
            sketch._queue = self

    def launch(self, work):
        self.sizes.append(len(work))
        sums = []
        for addresses, x, dy in work:
            assert x.is_contiguous() and dy.is_contiguous() and {x.dtype, dy.dtype} == {self._dtype}
            sketch = self.of[addresses]
            X, dY = (part.reshape(-1, part.shape[-1]).to(sketch.Y.dtype) for part in (x, dy))
            U, V = sketch.U.to(X.dtype), sketch.V.to(X.dtype)
            sums.append((sketch, sketch.Y + dY.mT @ (X @ V), sketch.Z + X.mT @ (dY @ U)))
        for sketch, Y, Z in sums:
            sketch.Y.copy_(Y)
            sketch.Z.copy_(Z)
