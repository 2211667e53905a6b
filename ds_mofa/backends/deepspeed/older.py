"""DeepSpeed before 0.19.8: what stands in for what came with it. Stages 2 and 3 train, save and resume.

Gradients of AdamW's part travel as DeepSpeed sends them, after every micro-batch and through its own buffers: the parts
that gradients/ works on are not there. A NaN skips the step in every dtype, as from 0.19.8 on; these versions look for one
in fp16 alone, and take a norm of NaN for one of 1. What they cannot be made to do is refused (:data:`REFUSED`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_mofa.backends.deepspeed import bases
from ds_mofa.backends.deepspeed.matrices import is_matrix, is_partitioned

__all__ = [
    "REFUSED",
    "GradientMixin",
    "Stage3Checks",
    "adamw",
    "combine_grad_norm_groups",
    "load_matrices",
    "with_matrices",
]

_UPGRADE = "or pip install 'deepspeed>=0.19.8'"

REFUSED: dict[str, Callable[[Any], bool]] = {
    "ZeRO stage 0 on this DeepSpeed, which does not skip a step for a NaN there, and on CPU ranks reduces no gradients: "
    f'set "stage": 2, {_UPGRADE}': lambda engine: not engine.zero_optimization(),
    "ZeRO stage 1 on this DeepSpeed, whose checkpoints of that stage have no place for the matrices: set "
    f'"stage": 2, {_UPGRADE}': lambda engine: (
        engine.zero_optimization() and engine.zero_optimization_stage() == 1
    ),
    f'universal checkpoints on this DeepSpeed: remove "load_universal", {_UPGRADE}': lambda engine: (
        engine.load_universal_checkpoint()
    ),
}  # fmt: skip


def combine_grad_norm_groups(norms: Iterable[Any]) -> Tensor:
    """The 2-norm of norms. -1, DeepSpeed's mark of one that is not finite, makes it infinite."""
    norms = [torch.as_tensor(norm) for norm in norms]
    device = next((norm.device for norm in norms if norm.device.type != "cpu"), torch.device("cpu"))
    stacked = torch.stack([norm.float().to(device).reshape(()) for norm in norms])
    total = torch.linalg.vector_norm(stacked)
    return torch.where((~stacked.isfinite() | (stacked < 0)).any(), torch.full_like(total, float("inf")), total)


class GradientMixin(bases.Stage12):
    """In the place of :class:`ds_mofa.backends.deepspeed.gradients.GradientMixin`, over DeepSpeedZeroOptimizer."""

    compute_grad_norm = False  # does not show a NaN here: every gradient is searched

    def plan_reductions(self, once: bool, managed_accumulation: bool) -> None:
        """Nothing to plan; see the module."""
        self.check_grad_overflow = True
        # 0.18.7 to 0.18.9 flatten weights with their graph, and gloo gathers no tensors that have one.
        for tensors in (self.bit16_groups_flat, *self.parallel_partitioned_bit16_groups):
            tensors[:] = [tensor.detach() for tensor in tensors]

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        # DeepSpeed counts on a gradient in every backward; one that reaches matrices alone has none for it.
        if any(bucket.params for bucket in self.ipg_buckets.values()):
            super().reduce_ipg_grads(comm_dtype)


class Stage3Checks(bases.Stage3):
    """Over DeepSpeedZeroOptimizer_Stage3."""

    def _overflow_check_and_loss_scale_update(self) -> Any:
        if self.dtype != torch.float16:  # of which DeepSpeed looks itself
            self.check_overflow()
        return super()._overflow_check_and_loss_scale_update()


def adamw(engine: Any, groups: list[dict[str, Any]], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Which of DeepSpeed's and torch's AdamWs the config asks for.

    DeepSpeed chooses and builds in one: it is shown a config of AdamW for that long.
    """
    config = engine._config
    before = config.optimizer_name, config.optimizer_params
    config.optimizer_name, config.optimizer_params = "adamw", dict(settings)
    try:
        return engine._configure_basic_optimizer(groups)
    finally:
        config.optimizer_name, config.optimizer_params = before


# ---------------------------------------------------------------------- checkpoints


def with_matrices(original: Callable[[Any], dict], engine: Any, attribute: Callable[[nn.Parameter], Any]) -> dict:
    """``engine._get_zero_frozen_param_attributes``: matrices are saved as frozen parameters are.

    Args:
        attribute: what of each is saved, its shape or its weight.
    """
    frozen = original(attribute)
    return frozen | {name: attribute(param) for param, name in engine.param_names.items() if is_matrix(param)}


def load_matrices(engine: Any, fragments: Mapping[str, Tensor]) -> None:
    """And loaded as they are."""
    for param, name in engine.param_names.items():
        if is_matrix(param):
            (param.ds_tensor if is_partitioned(param) else param).data.copy_(fragments[name].data)
