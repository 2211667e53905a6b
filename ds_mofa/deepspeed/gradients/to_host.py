"""Gradients go to the host in pieces.

With ``offload_optimizer`` DeepSpeed converts a whole gradient to fp32 on the GPU before it goes, 2.1 GB for an output
head of 525 M parameters, and keeps a buffer there, as large as the largest parameter, in which what the host has added up
comes back to the gradient of the next micro-batch. Here both go by pieces of 64 MiB at most, in the same stream and
order, so each number is converted and added as it was. A gradient that the host has is gone at once, where DeepSpeed
lets those of all but the last micro-batch live until the backward ends; and one that is larger than the bucket goes
without the copy that DeepSpeed makes of it for its all-reduce, where one rank has nothing to reduce.
"""

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_mofa.deepspeed.bases import Stage12
from ds_mofa.deepspeed.gradients import pieces

__all__ = ["ToHostMixin"]


class ToHostMixin(Stage12):
    """Over DeepSpeedZeroOptimizer, with ``offload_optimizer``."""

    def shrink_host_buffer(self) -> None:
        """To one piece, where DeepSpeed has made one of the largest parameter."""
        if self.cpu_offload:
            buffer = self.temp_grad_buffer_for_gpu_offload
            self.temp_grad_buffer_for_gpu_offload = buffer.new_empty(min(pieces.PIECE, buffer.numel()))

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: nn.Parameter, i: int) -> None:
        param_id = self.get_param_id(param)
        if not self._goes_straight_to_the_host(param) or self.params_already_reduced[param_id]:
            return super().reduce_independent_p_g_buckets_and_remove_grads(param, i)
        self.params_already_reduced[param_id] = True
        accelerator = get_accelerator()
        here = accelerator.current_stream()
        stream = self.reduction_stream if self.overlap_comm else here
        if self.overlap_comm and not accelerator.resolves_data_dependency():
            stream.wait_stream(here)
        with accelerator.stream(stream):
            self._record_gradient_stream(self.get_param_gradient_attribute(param), stream)
            self.copy_grads_in_partition(param, i)

    def async_inplace_copy_grad_to_fp32_buffer_from_gpu(self, param: nn.Parameter) -> None:
        i, start, place, count = self.grad_position[self.get_param_id(param)]
        if count <= pieces.PIECE:
            return super().async_inplace_copy_grad_to_fp32_buffer_from_gpu(param)
        grad = self._gradient_of(param)
        here = get_accelerator().current_stream()
        if self._offload_gradient_safety_enabled:  # copies of other streams to the same place
            for stream, copied in self._pending_offload_events.items():
                if stream != here:
                    here.wait_event(copied)
        masters = self._masters_gradient(i).narrow(0, place, count)
        for target, piece in pieces.pieces_of(masters, grad.view(-1).narrow(0, start, count)):
            target.copy_(piece.to(self.master_weights_and_grads_dtype), non_blocking=True)
        self._record_gradient_stream(grad, here)
        self._record_offload_copy()
        self.clear_grad_attribute(param)

    def async_accumulate_grad_in_cpu_via_gpu(self, param: nn.Parameter) -> None:
        buffer = self.temp_grad_buffer_for_gpu_offload
        if param.numel() <= buffer.numel():
            return super().async_accumulate_grad_in_cpu_via_gpu(param)
        if self._offload_gradient_safety_enabled:  # the buffer, and what the host has, may be in use
            self._wait_for_offload_copies()
        grad = self._part_kept_on_host(param, self._gradient_of(param).data)
        for kept, piece in pieces.pieces_of(self._kept_on_host(param), grad):
            if self.micro_step_id > 0:
                came = buffer.narrow(0, 0, kept.numel())
                came.copy_(kept, non_blocking=True)
                piece.add_(came)
            kept.copy_(piece, non_blocking=True)
        self._record_offload_copy()
        if not self.is_gradient_accumulation_boundary():
            self._record_gradient_stream(grad, get_accelerator().current_stream())
            self.clear_grad_attribute(param)

    def _restore_cpu_offload_grad_to_gpu(self, param: nn.Parameter) -> None:
        buffer = self.temp_grad_buffer_for_gpu_offload
        if param.numel() <= buffer.numel():
            return super()._restore_cpu_offload_grad_to_gpu(param)
        if self._offload_gradient_safety_enabled:
            self._wait_for_offload_copies()
        grad = buffer.new_zeros(param.shape)
        self._part_kept_on_host(param, grad).copy_(self._kept_on_host(param), non_blocking=True)
        setattr(param, "grad_accum" if self.use_grad_accum_attribute else "grad", grad)

    # ------------------------------------------------------------------ parts

    def _gradient_of(self, param: nn.Parameter) -> Tensor:
        grad = self.get_param_gradient_attribute(param)
        assert grad is not None  # DeepSpeed comes here with gradients alone
        return grad

    def _masters_gradient(self, i: int) -> Tensor:
        """Of this rank's partition of group ``i``, flat, on the host."""
        grad = self.single_partition_of_fp32_groups[i].grad
        assert grad is not None  # DeepSpeed has made it with the partition
        return grad.view(-1)

    def _kept_on_host(self, param: nn.Parameter) -> Tensor:
        """Where the host adds the gradient up, flat: whole, or with low-precision masters where their gradient is."""
        param_id = self.get_param_id(param)
        if param_id not in self.accumulated_grads_in_cpu:
            if self.low_precision_master_weights_and_grads:
                i, _, place, count = self.grad_position[param_id]
                kept = self._masters_gradient(i).narrow(0, place, count)
            else:
                kept = torch.zeros(param.numel(), dtype=param.dtype, device=self.device)
                kept = get_accelerator().pin_memory(kept) if self.cpu_offload_pin_memory else kept
            self.accumulated_grads_in_cpu[param_id] = kept
        return self.accumulated_grads_in_cpu[param_id].view(-1)

    def _part_kept_on_host(self, param: nn.Parameter, grad: Tensor) -> Tensor:
        """What of ``grad`` belongs there."""
        if not self.low_precision_master_weights_and_grads:
            return grad.view(-1)
        _, start, _, count = self.grad_position[self.get_param_id(param)]
        return grad.view(-1).narrow(0, start, count)

    def _goes_straight_to_the_host(self, param: nn.Parameter) -> bool:
        alone = dist.get_world_size(group=self.dp_process_group) == 1
        kept = self.partition_gradients and self.contiguous_gradients and param.numel() > self.reduce_bucket_size
        return self.cpu_offload and alone and kept and getattr(param, "ds_grad_is_ready", True)
