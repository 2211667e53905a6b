"""How the gradients of AdamW's part travel in ZeRO stages 1 and 2: once a step, large ones without detours or copies.

What is left without the matrices is few but large, an embedding and an output head. Each has a param group of its own
(:mod:`ds_mofa.deepspeed.build`), so every rank's partition has a piece of it.
"""

from collections.abc import Iterator

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor

from ds_mofa.host_weights import CHUNK_BYTES

__all__ = ["PIECE", "GradientMixin"]

PIECE = CHUNK_BYTES // torch.float32.itemsize  # elements that a norm is taken of, or that pass to the host, at a time


class GradientMixin:
    """Over DeepSpeedZeroOptimizer.

    *Once a step.* Stage 2 sends every micro-batch's gradients, so that no rank need hold all of them; one that every
    rank has a piece of it keeps whole all the same. ``reduces_once`` lets them add up where autograd puts them until
    the step's last micro-batch, as stage 1 does, which spares the others their all-reduce and the host its waits.

    *Without detours.* DeepSpeed copies a gradient into a flat buffer, all-reduces it and copies this rank's piece back
    into the gradient, from there into a second buffer and flat again for the step. Where a group is one parameter whose
    partitions cover it exactly (``scattered``), a single reduce-scatter gives each rank its partition: half as much is
    sent, nothing is copied, and the gradient itself is gone. The second buffer, which the small parameters still go
    through, has room for those alone.

    *Without float64 copies.* DeepSpeed takes the norm of a gradient from a float64 copy of it, 4.2 GB for an output head
    of 525 M parameters: the highest peak there is where activations are checkpointed. Here it is taken in pieces.

    *In pieces to the host.* With ``offload_optimizer`` DeepSpeed converts a whole gradient to fp32 on the GPU before it
    goes, 2.1 GB for that head, and keeps a buffer there, as large as the largest parameter, in which what the host has
    added up comes back to the gradient of the next micro-batch. Here both go by pieces of 64 MiB at most, in the same
    stream and order, so each number is converted and added as it was. A gradient that the host has is gone at once,
    where DeepSpeed lets those of all but the last micro-batch live until the backward ends; and one that is larger than
    the bucket goes without the copy that DeepSpeed makes of it for its all-reduce, where one rank has nothing to reduce.

    Attributes:
        reduces_once: see above; stage 1 needs no help with it.
        scattered: indices of the groups whose gradient is reduce-scattered.
    """

    reduces_once: bool
    scattered: frozenset[int]

    def plan_reductions(self, once: bool, managed_accumulation: bool) -> None:
        """Decide both, from ``adamw_reduce`` and what DeepSpeed has been configured to do.

        Args:
            once: the option says once a step.
            managed_accumulation: DeepSpeed counts the micro-batches of a step, and so knows its last one.
        """
        usual = managed_accumulation and not self.cpu_offload and not self.use_separate_grad_accum
        self.reduces_once = usual and once and self.partition_gradients
        last_only = usual and (self.reduces_once or not self.partition_gradients)
        self._scattered_in_this_backward: set[int] = set()
        groups = range(len(self.bit16_groups)) if last_only and self.reduce_scatter else ()
        self.scattered = frozenset(i for i in groups if self._covered_by_partitions(i))
        if self.cpu_offload:  # DeepSpeed has made one of the largest parameter
            buffer = self.temp_grad_buffer_for_gpu_offload
            self.temp_grad_buffer_for_gpu_offload = buffer.new_empty(min(PIECE, buffer.numel()))

    def _covered_by_partitions(self, i: int) -> bool:
        if len(self.bit16_groups[i]) != 1 or self.real_dp_process_group[i] is not self.dp_process_group:
            return False
        (param,) = self.bit16_groups[i]
        world_size = dist.get_world_size(group=self.dp_process_group)
        exact = int(self.partition_size[i]) * world_size == param.numel()
        return world_size > 1 and exact and self.get_param_comm_dtype(param) == param.dtype

    # ------------------------------------------------------------------ DeepSpeed's methods

    def process_gradients(self, param, i):
        if not self._holds_back():
            super().process_gradients(param, i)

    def overlapping_partition_gradients_reduce_epilogue(self):
        if not self._holds_back():
            super().overlapping_partition_gradients_reduce_epilogue()

    def reduce_ipg_grads(self, comm_dtype=None):
        # DeepSpeed counts on a gradient in every backward; one that reaches matrices alone has none for it.
        if any(bucket.params for bucket in self.ipg_buckets.values()):
            super().reduce_ipg_grads(comm_dtype)

    def reduce_ready_partitions_and_remove_grads(self, param, i):
        if i not in self.scattered:
            super().reduce_ready_partitions_and_remove_grads(param, i)
        elif self.is_gradient_accumulation_boundary() and param.grad is not None:
            grad, param.grad = param.grad, None
            self._scatter(grad, i)

    def reduce_independent_p_g_buckets_and_remove_grads(self, param, i):
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

    def copy_grads_in_partition(self, param, group_idx=None):
        if self.scattered and self.grads_in_partition is None:  # DeepSpeed would make room for all groups
            copied = [g for i, g in enumerate(self.params_in_partition) if i not in self.scattered]
            numel = sum(p.numel() for group in copied for p in group)
            self.grads_in_partition = torch.empty(numel, dtype=self.dtype, device=param.device)
            self.grads_in_partition_offset = 0
        super().copy_grads_in_partition(param, group_idx)

    def clear_backward_seen_flag(self):  # every forward calls it
        super().clear_backward_seen_flag()
        self._scattered_in_this_backward.clear()

    def _use_compact_grad_partition_buffer(self, group_idx):
        # DeepSpeed's word for a group whose averaged gradient is a flat partition already, or zeros if none came.
        return group_idx in self.scattered or super()._use_compact_grad_partition_buffer(group_idx)

    def get_grad_norm_direct(self, gradients, params, norm_type=2):
        if norm_type == 2:  # a norm's norm is itself, so DeepSpeed gets those
            gradients = [_norm(grad) for grad in gradients if not getattr(grad, "_zero_padding", False)]
        return super().get_grad_norm_direct(gradients, params, norm_type)

    def set_norm_for_param_grad_in_gpu(self, param):
        grad = self.get_param_gradient_attribute(param)
        grad = param.grad if grad is None else grad
        _, start, _, count = self.grad_position[self.get_param_id(param)]
        self.norm_for_param_grads[self.get_param_id(param)] = _norm(grad.view(-1).narrow(0, start, count))

    # ------------------------------------------------------------------ DeepSpeed's methods of offload_optimizer

    def async_inplace_copy_grad_to_fp32_buffer_from_gpu(self, param):
        i, start, place, count = self.grad_position[self.get_param_id(param)]
        if count <= PIECE:
            return super().async_inplace_copy_grad_to_fp32_buffer_from_gpu(param)
        grad = self.get_param_gradient_attribute(param)
        here = get_accelerator().current_stream()
        if self._offload_gradient_safety_enabled:  # copies of other streams to the same place
            for stream, copied in self._pending_offload_events.items():
                if stream != here:
                    here.wait_event(copied)
        masters = self.single_partition_of_fp32_groups[i].grad.view(-1).narrow(0, place, count)
        for target, piece in _pieces(masters, grad.view(-1).narrow(0, start, count)):
            target.copy_(piece.to(self.master_weights_and_grads_dtype), non_blocking=True)
        self._record_gradient_stream(grad, here)
        self._record_offload_copy()
        self.clear_grad_attribute(param)

    def async_accumulate_grad_in_cpu_via_gpu(self, param):
        buffer = self.temp_grad_buffer_for_gpu_offload
        if param.numel() <= buffer.numel():
            return super().async_accumulate_grad_in_cpu_via_gpu(param)
        if self._offload_gradient_safety_enabled:  # the buffer, and what the host has, may be in use
            self._wait_for_offload_copies()
        grad = self._part_kept_on_host(param, self.get_param_gradient_attribute(param).data)
        for kept, piece in _pieces(self._kept_on_host(param), grad):
            if self.micro_step_id > 0:
                came = buffer.narrow(0, 0, kept.numel())
                came.copy_(kept, non_blocking=True)
                piece.add_(came)
            kept.copy_(piece, non_blocking=True)
        self._record_offload_copy()
        if not self.is_gradient_accumulation_boundary():
            self._record_gradient_stream(grad, get_accelerator().current_stream())
            self.clear_grad_attribute(param)

    def _restore_cpu_offload_grad_to_gpu(self, param):
        buffer = self.temp_grad_buffer_for_gpu_offload
        if param.numel() <= buffer.numel():
            return super()._restore_cpu_offload_grad_to_gpu(param)
        if self._offload_gradient_safety_enabled:
            self._wait_for_offload_copies()
        grad = buffer.new_zeros(param.shape)
        self._part_kept_on_host(param, grad).copy_(self._kept_on_host(param), non_blocking=True)
        if self.use_grad_accum_attribute:
            param.grad_accum = grad
        else:
            param.grad = grad

    # ------------------------------------------------------------------ parts

    def _kept_on_host(self, param) -> Tensor:
        """Where the host adds the gradient up, flat: whole, or with low-precision masters where their gradient is."""
        param_id = self.get_param_id(param)
        if param_id not in self.accumulated_grads_in_cpu:
            if self.low_precision_master_weights_and_grads:
                i, _, place, count = self.grad_position[param_id]
                kept = self.single_partition_of_fp32_groups[i].grad.view(-1).narrow(0, place, count)
            else:
                kept = torch.zeros(param.numel(), dtype=param.dtype, device=self.device)
                kept = get_accelerator().pin_memory(kept) if self.cpu_offload_pin_memory else kept
            self.accumulated_grads_in_cpu[param_id] = kept
        return self.accumulated_grads_in_cpu[param_id].view(-1)

    def _part_kept_on_host(self, param, grad: Tensor) -> Tensor:
        """What of ``grad`` belongs there."""
        if not self.low_precision_master_weights_and_grads:
            return grad.view(-1)
        _, start, _, count = self.grad_position[self.get_param_id(param)]
        return grad.view(-1).narrow(0, start, count)

    def _goes_straight_to_the_host(self, param) -> bool:
        alone = dist.get_world_size(group=self.dp_process_group) == 1
        kept = self.partition_gradients and self.contiguous_gradients and param.numel() > self.reduce_bucket_size
        return self.cpu_offload and alone and kept and getattr(param, "ds_grad_is_ready", True)

    def _holds_back(self) -> bool:
        return self.reduces_once and not self.is_gradient_accumulation_boundary()

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
        else:  # in the place of one that no step has taken
            self.averaged_gradients[i] = GradPartitionBufferGroup([part], part)
            self._scattered_in_this_backward.add(i)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat tensors of one length, piece by piece."""
    return zip(*(tensor.split(PIECE) for tensor in tensors), strict=True)


def _norm(tensor: Tensor) -> Tensor:
    """The 2-norm, in DeepSpeed's dtype for norms."""
    wide = get_norm_dtype()
    # The GPU adds squares of 16-bit numbers up in fp32 as it reads them; any other widening is a copy.
    direct = torch.float32 if tensor.itemsize == 2 else wide
    pieces = tensor.detach().reshape(-1).split(PIECE)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=direct).to(wide) for p in pieces]))
