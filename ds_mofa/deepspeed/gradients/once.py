"""Gradients are sent once a step.

Stage 2 sends every micro-batch's gradients, so that no rank need hold all of them; one that every rank has a piece of it
keeps whole all the same. With ``reduces_once`` they add up where autograd puts them until the step's last micro-batch,
as in stage 1, which spares the others their all-reduce and the host its waits.
"""

import torch
from torch import nn

from ds_mofa.deepspeed.bases import Stage12

__all__ = ["OnceMixin"]


class OnceMixin(Stage12):
    """Over DeepSpeedZeroOptimizer.

    Attributes:
        reduces_once: see above; stage 1 needs no help with it.
    """

    reduces_once: bool

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        if not self._holds_back():
            super().process_gradients(param, i)

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        if not self._holds_back():
            super().overlapping_partition_gradients_reduce_epilogue()

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        # DeepSpeed counts on a gradient in every backward; one that reaches matrices alone has none for it.
        if any(bucket.params for bucket in self.ipg_buckets.values()):
            super().reduce_ipg_grads(comm_dtype)

    def _holds_back(self) -> bool:
        return self.reduces_once and not self.is_gradient_accumulation_boundary()
