"""What the mixins count on in the optimizers of DeepSpeed that they are put over, for type checkers alone.

At run time a mixin has no base: its class is put over DeepSpeed's when an engine has built one. DeepSpeed has no types,
so those that are used here are written down; :mod:`ds_mofa.backends.deepspeed.surface` says of each name what it is needed for,
and a test that DeepSpeed has it.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

__all__ = ["Bf16", "ChecksItself", "Optimizer", "Partitioned", "Replicated16", "Stage12", "Stage3", "Zero"]

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

    import torch
    from torch import Tensor

    class Partitioned(nn.Parameter):
        """A parameter that stage 3 or ``zero.Init`` has partitioned."""

        ds_numel: int
        ds_persist: bool
        ds_process_group: Any
        ds_secondary_tensor: Tensor | None
        ds_shape: torch.Size
        ds_tensor: Any  # this rank's shard, a tensor with ds_numel, its length with the padding

    class Optimizer:
        """DeepSpeedOptimizer: all of them."""

        clip_grad: float
        loss_scale: float
        overflow: bool

        def step(self, closure: Any = None) -> Any: ...
        def zero_grad(self, set_to_none: bool = True) -> None: ...
        def state_dict(self) -> Any: ...
        def destroy(self) -> None: ...

    class Zero(Optimizer):
        """ZeROOptimizer: stages 1 to 3."""

        dp_process_group: Any

        def load_state_dict(
            self, state_dict_list: Sequence[dict] | None, load_optimizer_states: bool = True, **kwargs: Any
        ) -> None: ...

    class Stage12(Zero):
        """DeepSpeedZeroOptimizer: stages 1 and 2."""

        accumulated_grads_in_cpu: MutableMapping[int, Tensor]
        averaged_gradients: MutableMapping[int, Any]
        bit16_groups: Sequence[Sequence[nn.Parameter]]
        bit16_groups_flat: list[Tensor]
        check_grad_overflow: bool
        compute_grad_norm: bool
        contiguous_gradients: bool
        cpu_offload: bool
        cpu_offload_pin_memory: bool
        device: torch.device
        dtype: torch.dtype
        grad_position: Mapping[int, tuple[int, int, int, int]]  # group, place in the gradient, in the partition, length
        gradient_average: bool
        grads_in_partition: Tensor | None
        grads_in_partition_offset: int
        ipg_buckets: Mapping[Any, Any]
        low_precision_master_weights_and_grads: bool
        master_weights_and_grads_dtype: torch.dtype
        micro_step_id: int
        norm_for_param_grads: MutableMapping[int, Tensor]
        overlap_comm: bool
        parallel_partitioned_bit16_groups: Sequence[list[Tensor]]
        params_already_reduced: list[bool]
        params_in_partition: Sequence[Sequence[nn.Parameter]]
        partition_gradients: bool
        partition_size: Sequence[int]
        real_dp_process_group: Sequence[Any]
        reduce_bucket_size: int
        reduce_scatter: bool
        reduction_stream: Any
        sequence_parallel_size: int
        single_partition_of_fp32_groups: Sequence[Tensor]
        temp_grad_buffer_for_gpu_offload: Tensor
        use_grad_accum_attribute: bool
        use_separate_grad_accum: bool
        _offload_gradient_safety_enabled: bool
        _pending_offload_events: Mapping[Any, Any]

        def is_gradient_accumulation_boundary(self) -> Any: ...
        def get_param_id(self, param: nn.Parameter) -> Any: ...
        def get_param_comm_dtype(self, param: nn.Parameter) -> Any: ...
        def get_param_gradient_attribute(self, param: nn.Parameter) -> Any: ...
        def clear_grad_attribute(self, param: nn.Parameter) -> None: ...
        def _link_all_hp_params(self) -> None: ...
        def _record_gradient_stream(self, tensor: Tensor | None, stream: Any) -> None: ...
        def _record_offload_copy(self) -> None: ...
        def _wait_for_offload_copies(self) -> None: ...

        def has_overflow(self, partition_gradients: bool = True) -> Any: ...
        def scaled_global_norm(self, norm_type: float = 2) -> Any: ...
        def process_gradients(self, param: nn.Parameter, i: int) -> None: ...
        def overlapping_partition_gradients_reduce_epilogue(self) -> None: ...
        def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None: ...
        def reduce_ready_partitions_and_remove_grads(self, param: nn.Parameter, i: int) -> None: ...
        def reduce_independent_p_g_buckets_and_remove_grads(self, param: nn.Parameter, i: int) -> None: ...
        def copy_grads_in_partition(self, param: nn.Parameter, group_idx: int | None = None) -> None: ...
        def clear_backward_seen_flag(self) -> None: ...
        def get_grad_norm_direct(
            self, gradients: Sequence[Tensor], params: Sequence[nn.Parameter], norm_type: float = 2
        ) -> Any: ...
        def set_norm_for_param_grad_in_gpu(self, param: nn.Parameter) -> None: ...
        def async_inplace_copy_grad_to_fp32_buffer_from_gpu(self, param: nn.Parameter) -> None: ...
        def async_accumulate_grad_in_cpu_via_gpu(self, param: nn.Parameter) -> None: ...
        def _use_compact_grad_partition_buffer(self, group_idx: int) -> Any: ...
        def _restore_cpu_offload_grad_to_gpu(self, param: nn.Parameter) -> None: ...

    class Stage3(Zero):
        """DeepSpeedZeroOptimizer_Stage3."""

        offload_param: bool
        offload_param_pin_memory: bool

        dtype: torch.dtype

        def check_overflow(self, partition_gradients: bool = True) -> None: ...
        def _overflow_check_and_loss_scale_update(self) -> Any: ...  # before 0.19.8
        def has_overflow(self, partition_gradients: bool = True) -> Any: ...
        def invalidate_secondary_tensor(self) -> None: ...
        def _get_norm_groups(self) -> Any: ...
        def _post_step(self, timer_names: Any) -> None: ...

        def get_full_hp_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> Any: ...
        def set_full_hp_param(self, value: Tensor, param: nn.Parameter, optim_state_key: str | None = None) -> None: ...
        def get_local_fp32_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> Any: ...
        def set_local_hp_param(
            self, value: Tensor, param: nn.Parameter, optim_state_key: str | None = None
        ) -> None: ...
        def get_fp32_grad_for_param(self, param: nn.Parameter) -> Any: ...
        def set_fp32_grad_for_param(self, value: Tensor, param: nn.Parameter) -> None: ...
        def get_local_fp32_grad_for_param(self, param: nn.Parameter) -> Any: ...
        def set_local_grad_for_param(self, value: Tensor, param: nn.Parameter) -> None: ...

    class Bf16(Zero):
        """BF16_Optimizer: stage 1 in bf16 with fp32 gradient accumulation."""

        _global_grad_norm: float | Tensor

        def get_grads_for_norm(self, for_clipping: bool = False) -> Any: ...

    class Replicated16(Optimizer):
        """FP16_Optimizer and FP16_UnfusedOptimizer, which DeepSpeed uses for bf16 at stage 0 too."""

        fp16_groups: Sequence[Sequence[nn.Parameter]]
        _global_grad_norm: float | Tensor

        def load_state_dict(self, state_dict: dict, load_optimizer_states: bool = True) -> None: ...
        def unscale_and_clip_grads(self, *args: Any, **kwargs: Any) -> Any: ...
        def _skip_invalid_grad_norm(self) -> Any: ...

else:
    Partitioned = nn.Parameter
    Optimizer = Zero = Stage12 = Stage3 = Bf16 = Replicated16 = object


class ChecksItself:
    """Over an optimizer of DeepSpeed's that looks for a NaN in every dtype; ``older.Stage3Checks`` is over others."""
