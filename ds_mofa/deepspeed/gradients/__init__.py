"""How the gradients of AdamW's part travel in ZeRO stages 1 and 2.

What is left without the matrices is few but large, an embedding and an output head. Each has a param group of its own
(:mod:`ds_mofa.deepspeed.build`), so every rank's partition has a piece of it.

once.py      gradients are sent once a step, not after every micro-batch
scatter.py   large ones by a single reduce-scatter, without detours through buffers
norms.py     their norms without float64 copies
to_host.py   to the host in pieces, with ``offload_optimizer``
pieces.py    how large a piece is
"""

from ds_mofa.deepspeed.gradients.norms import NormMixin
from ds_mofa.deepspeed.gradients.once import OnceMixin
from ds_mofa.deepspeed.gradients.scatter import ScatterMixin
from ds_mofa.deepspeed.gradients.to_host import ToHostMixin

__all__ = ["GradientMixin"]


class GradientMixin(OnceMixin, ScatterMixin, NormMixin, ToHostMixin):
    """All of them, over DeepSpeedZeroOptimizer."""

    def plan_reductions(self, once: bool, managed_accumulation: bool) -> None:
        """Decide what is done of it, from ``adamw_reduce`` and what DeepSpeed has been configured to do.

        Args:
            once: the option says once a step.
            managed_accumulation: DeepSpeed counts the micro-batches of a step, and so knows its last one.
        """
        usual = managed_accumulation and not self.cpu_offload and not self.use_separate_grad_accum
        self.reduces_once = usual and once and self.partition_gradients
        self.plan_scatter(last_only=usual and (self.reduces_once or not self.partition_gradients))
        self.shrink_host_buffer()
