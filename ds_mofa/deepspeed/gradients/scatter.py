"""Large gradients without detours.

DeepSpeed copies a gradient into a flat buffer, all-reduces it and copies this rank's piece back into the gradient, from
there into a second buffer and flat again for the step. Where a group is one parameter whose partitions cover it exactly
(``scattered``), a single reduce-scatter gives each rank its partition: half as much is sent, nothing is copied, and the
gradient itself is gone. The second buffer, which the small parameters still go through, has room for those alone.
"""

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from torch import Tensor, nn

from ds_mofa.deepspeed.bases import Stage12

__all__ = ["ScatterMixin"]


class ScatterMixin(Stage12):
    """Over DeepSpeedZeroOptimizer.

    Attributes:
        scattered: indices of the groups whose gradient is reduce-scattered.
    """

    scattered: frozenset[int]

    def plan_scatter(self, last_only: bool) -> None:
        """Decide which groups are.

        Args:
            last_only: gradients are reduced after the step's last micro-batch alone.
        """
        self._scattered_in_this_backward: set[int] = set()
        groups = range(len(self.bit16_groups)) if last_only and self.reduce_scatter else ()
        self.scattered = frozenset(i for i in groups if self._covered_by_partitions(i))

    def reduce_ready_partitions_and_remove_grads(self, param: nn.Parameter, i: int) -> None:
        if i not in self.scattered:
            super().reduce_ready_partitions_and_remove_grads(param, i)
        elif self.is_gradient_accumulation_boundary() and param.grad is not None:
            grad, param.grad = param.grad, None
            self._scatter(grad, i)

    def copy_grads_in_partition(self, param: nn.Parameter, group_idx: int | None = None) -> None:
        if self.scattered and self.grads_in_partition is None:  # DeepSpeed would make room for all groups
            copied = [g for i, g in enumerate(self.params_in_partition) if i not in self.scattered]
            numel = sum(p.numel() for group in copied for p in group)
            self.grads_in_partition = torch.empty(numel, dtype=self.dtype, device=param.device)
            self.grads_in_partition_offset = 0
        super().copy_grads_in_partition(param, group_idx)

    def clear_backward_seen_flag(self) -> None:  # every forward calls it
        super().clear_backward_seen_flag()
        self._scattered_in_this_backward.clear()

    def _use_compact_grad_partition_buffer(self, group_idx: int) -> bool:
        # DeepSpeed's word for a group whose averaged gradient is a flat partition already, or zeros if none came.
        return group_idx in self.scattered or super()._use_compact_grad_partition_buffer(group_idx)

    def _covered_by_partitions(self, i: int) -> bool:
        if len(self.bit16_groups[i]) != 1 or self.real_dp_process_group[i] is not self.dp_process_group:
            return False
        (param,) = self.bit16_groups[i]
        world_size = dist.get_world_size(group=self.dp_process_group)
        exact = int(self.partition_size[i]) * world_size == param.numel()
        return world_size > 1 and exact and self.get_param_comm_dtype(param) == param.dtype

    def _scatter(self, grad: Tensor, i: int) -> None:
        """Reduce-scatter the gradient of group ``i``; the epilogue waits for the stream of the reductions."""
        part = grad.new_empty(int(self.partition_size[i]))
        accelerator = get_accelerator()
        here = accelerator.current_stream()
        stream = self.reduction_stream if self.overlap_comm else here
        apart = self.overlap_comm and not accelerator.resolves_data_dependency()
        if apart:
            stream.wait_stream(here)
        with accelerator.stream(stream):
            flat = grad.reshape(-1)
            if self.gradient_average:  # before they are added, or fp16 might not hold the sum
                flat.div_(dist.get_world_size(group=self.dp_process_group) / float(self.sequence_parallel_size))
            dist.reduce_scatter_tensor(part, flat, group=self.dp_process_group)
            if apart:
                flat.record_stream(stream)
        if i in self._scattered_in_this_backward:  # reentrant checkpointing comes by more than once
            if apart:
                here.wait_stream(stream)
            self.averaged_gradients[i].flat_partition.add_(part)
        else:  # instead of one that no step has taken
            self.averaged_gradients[i] = GradPartitionBufferGroup([part], part)
            self._scattered_in_this_backward.add(i)
