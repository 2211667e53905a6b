"""ZeRO stages 1 to 3: DeepSpeed's own optimizer for the AdamW part, and the matrices' step woven into its step.

DeepSpeed builds its ZeRO optimizer around AdamW alone; the matrices are in none of its groups, so it makes no
bucket, no fp32 copy and no state for them. The object that it built then gets a class made of a mixin and its
own class, so that every isinstance check in the engine still holds.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from ds_mofa.backends.deepspeed import bases, versions
from ds_mofa.backends.deepspeed.embeddings import spare_gathering
from ds_mofa.backends.deepspeed.matrices import Stage3Accessors, answer_for_whole, is_partitioned, move_shards
from ds_mofa.groups import check_rates
from ds_mofa.optimizers.base import MatrixOptimizer, clip_factor
from ds_mofa.phases import phase
from ds_mofa.weights.staging import HostMemory

if TYPE_CHECKING or not versions.is_older(versions.WHOLE):
    from deepspeed.runtime.utils import combine_grad_norm_groups

    from ds_mofa.backends.deepspeed.bases import ChecksItself as Stage3Checks
    from ds_mofa.backends.deepspeed.gradients import GradientMixin
else:
    from ds_mofa.backends.deepspeed.older import GradientMixin, Stage3Checks, combine_grad_norm_groups

__all__ = ["wrap_zero", "MatrixMixin", "swap_class"]


def wrap_zero(optimizer: Any, mofa: MatrixOptimizer, managed_accumulation: bool = True) -> Any:
    """Weave ``mofa``'s matrices into the ZeRO optimizer that DeepSpeed has built around its AdamW.

    Args:
        managed_accumulation: DeepSpeed counts the micro-batches of a step, and so knows its last one.
    """
    mixin: type[MatrixMixin]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        mixin = Stage3Mixin
    elif isinstance(optimizer, BF16_Optimizer):
        mixin = Bf16Mixin
    else:
        mixin = Stage12Mixin
    optimizer = swap_class(optimizer, mixin, mofa)
    if mixin is Stage12Mixin:
        optimizer.plan_reductions(mofa.options.adamw_reduce == "step", managed_accumulation)
    return optimizer


def swap_class(optimizer: Any, mixin: type["MatrixMixin"], mofa: MatrixOptimizer) -> Any:
    """Give ``optimizer`` a class of ``mixin`` over its own."""
    optimizer.__class__ = type(f"{mofa.options.title}{type(optimizer).__name__}", (mixin, type(optimizer)), {})
    optimizer.mofa = mofa
    optimizer.matrix_state = None
    facade: Any = mofa
    facade._opt_called = True  # torch's schedulers ask the facade whether a step came before theirs
    optimizer.bind_accessors()
    return optimizer


class MatrixMixin(bases.Optimizer):
    """What every stage shares. ``step``: reduce the sketches, DeepSpeed's own step, then the matrices' step."""

    mofa: MatrixOptimizer
    matrix_state: dict | None  # gathered before a checkpoint is written, see registration

    @property
    def param_groups(self) -> list[dict]:
        return self.mofa.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict]) -> None:
        self.mofa.param_groups = groups

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    def get_lr(self) -> float:
        return self.param_groups[0]["lr"]

    def step(self, closure: Any = None) -> Any:
        matrices = self.mofa.matrices
        check_rates(self.param_groups, self.mofa.options)
        self.mofa.report_thawed()
        # Read now, DeepSpeed's step may change it. Wrappers without a scaler do not scale the loss.
        self._scale: float = self.loss_scale if hasattr(self, "loss_scaler") else 1.0
        matrices.reduce(self._scale)
        self._global_norm: Tensor = matrices.norm
        with phase("AdamW"), self.mofa.adamw_lr():
            result = self.deepspeed_step()
        if self.overflow:
            matrices.discard()
        elif matrices.pending:
            self.update_matrices()
        return result

    def deepspeed_step(self) -> Any:
        """AdamW's part; must leave ``self.overflow`` True if the sketches hold a NaN or Inf."""
        return super().step()

    def update_matrices(self) -> None:
        """Factors and weights, with the gradient clipped by the same norm as AdamW's part."""
        clip = clip_factor(self._global_norm, self.clip_grad) if self.clip_grad > 0 else 1.0
        self.mofa.matrices.update(self.mofa.matrix_groups, clip)

    def with_matrix_norm(self, norms: list[Tensor]) -> Tensor:
        """One norm of AdamW's gradients and the matrices' sketches; scaled by the loss scale, as ``norms`` are."""
        ours = self.mofa.matrices.norm.float() * self._scale
        device = next((norm.device for norm in norms if isinstance(norm, Tensor)), ours.device)
        total = combine_grad_norm_groups([*norms, ours.to(device)])
        self._global_norm = (total / self._scale).to(ours.device)
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.mofa.adamw_gradients.dropped():
            self.mofa.matrices.clear()

    def state_dict(self) -> dict:
        state = super().state_dict()
        matrices = self.mofa.matrices
        state["mofasgd"] = {
            "matrices": self.matrix_state or {},
            "masters": matrices.masters.state_dict(),
            "groups": self.mofa.group_settings(),
        }
        return state

    def load_matrices(self, state: dict, masters: dict[str, Tensor] | None = None) -> None:
        """Take over what :meth:`state_dict` holds of the matrices.

        Args:
            masters: this rank's, instead of the saved ones.
        """
        saved = state.get("mofasgd")
        if saved is None:
            raise ValueError(
                f"the checkpoint was saved by another optimizer than {self.mofa.options.title}: load its weights "
                "alone, with load_checkpoint(..., load_optimizer_states=False)"
            )
        self.mofa.check_group_settings(saved["groups"])
        self.mofa.matrices.load_state_dict(saved["matrices"])
        self.mofa.load_group_settings(saved["groups"])
        self.mofa.matrices.masters.load_state_dict(saved["masters"] if masters is None else masters)

    def destroy(self) -> None:
        self.mofa.matrices.detach()
        if hasattr(super(), "destroy"):  # the 16-bit wrappers of stage 0 have none
            super().destroy()

    def bind_accessors(self) -> None:
        """Answer ``deepspeed.utils.safe_get_full_fp32_param`` and its like for matrices."""
        for matrix in self.mofa.split.matrices:
            answer_for_whole(matrix.param, written=self.mofa.matrices.masters.refresh)


class ZeroMixin(MatrixMixin, bases.Zero):
    """Stages 1 to 3: a list of state dicts, one for each saving rank; only the first has the factors."""

    def load_state_dict(
        self, state_dict_list: Sequence[dict] | None, load_optimizer_states: bool = True, **kwargs: Any
    ) -> None:
        super().load_state_dict(state_dict_list, load_optimizer_states=load_optimizer_states, **kwargs)
        if state_dict_list is None:
            return  # a universal checkpoint: universal.restore does the rest
        if load_optimizer_states:
            self.load_matrices(state_dict_list[dist.get_rank(self.dp_process_group)])
        else:
            self.mofa.matrices.masters.refresh()


class Stage12Mixin(GradientMixin, ZeroMixin):
    """DeepSpeedZeroOptimizer: stages 1 and 2."""

    def bind_accessors(self) -> None:
        super().bind_accessors()
        self._share_masters()

    def _share_masters(self) -> None:
        """With bf16 masters of bf16 weights, let a partition be its own master: 2 bytes less a parameter of it.

        DeepSpeed keeps a second copy, steps it and copies it back; on one tensor that copy moves nothing.
        """
        if self.cpu_offload:
            return
        for i, masters in enumerate(self.single_partition_of_fp32_groups):
            weights = self.parallel_partitioned_bit16_groups[i][dist.get_rank(self.real_dp_process_group[i])]
            if masters.dtype == weights.dtype:
                masters.data = weights.data
        self._link_all_hp_params()  # its fragments are views of the masters

    def deepspeed_step(self) -> Any:
        # In bf16 and fp32 DeepSpeed does not look for a NaN unless told to.
        checks = self.check_grad_overflow
        self.check_grad_overflow = checks or not self.mofa.matrices.finite
        try:
            return super().deepspeed_step()
        finally:
            self.check_grad_overflow = checks

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        if not self.mofa.matrices.finite:
            return True
        if self.compute_grad_norm and not self.cpu_offload:
            return False  # the norm, which is next, shows it; a search of every tensor would cost as much as the update
        return super().has_overflow(partition_gradients)

    def scaled_global_norm(self, norm_type: float = 2) -> Tensor:
        return self.with_matrix_norm([super().scaled_global_norm(norm_type)])


class Stage3Mixin(Stage3Checks, Stage3Accessors, ZeroMixin, bases.Stage3):
    """DeepSpeedZeroOptimizer_Stage3."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.mofa.adamw_gradients.restarted = True

    def _get_norm_groups(self) -> list[Tensor]:
        return [self.with_matrix_norm(super()._get_norm_groups())]

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        return super().has_overflow(partition_gradients) or not self.mofa.matrices.finite

    def _post_step(self, timer_names: Any) -> None:
        # Here every parameter is partitioned, and persistent ones are gathered next. Loading a checkpoint comes
        # by too, with nothing pending.
        if self.mofa.matrices.pending:
            self.update_matrices()
        super()._post_step(timer_names)

    def invalidate_secondary_tensor(self) -> None:
        super().invalidate_secondary_tensor()
        for matrix in self.mofa.split.matrices:  # else hpZ goes on with the old weights
            assert is_partitioned(matrix.param)
            matrix.param.ds_secondary_tensor = None

    def bind_accessors(self) -> None:
        for matrix in self.mofa.split.matrices:
            asked: Any = matrix.param
            asked._z3_optimizer = self
        self.mofa.matrices.on_detach(spare_gathering(self.mofa.split.matrices))
        if self.offload_param:
            move_shards(self.mofa.split.matrices, HostMemory(self.offload_param_pin_memory))


class Bf16Mixin(ZeroMixin, bases.Bf16):
    """BF16_Optimizer: stage 1 in bf16 with fp32 gradient accumulation."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)  # which drops what it has accumulated too
        self.mofa.matrices.clear()

    def get_grads_for_norm(self, for_clipping: bool = False) -> Any:
        grads = super().get_grads_for_norm(for_clipping)
        if for_clipping:
            return grads
        return [*grads[0], self.mofa.matrices.norm.float().view(1)], grads[1]

    def update_matrices(self) -> None:
        self._global_norm = torch.as_tensor(self._global_grad_norm)
        super().update_matrices()
