"""Which storage is what: weights, gradients, states, factors, sketches, buckets, each counted once.

A view shares its storage, and ZeRO makes all its tensors views of flat ones, so what is counted is the storage.
Where one could be two things (a partition that is its own master), the first in the order of reading has it.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.profiler.measure.fully_sharded import held_by_fsdp2, parameters
from ds_mofa.profiler.storages import with_memory
from ds_mofa.step.step import MatrixStep

__all__ = ["Known", "inventory", "buckets", "sizes", "leaves", "tensors", "unwrap_optimizer"]


class Known(NamedTuple):
    """A storage whose purpose is known.

    Attributes:
        address: of its first byte.
        size: bytes.
        category: one of :data:`~ds_mofa.profiler.categories.CATEGORIES`.
        device: type of its device, ``"cuda"`` or ``"cpu"``.
    """

    address: int
    size: int
    category: str
    device: str


# Attributes of DeepSpeed's optimizers (0.19), whatever their nesting, in the order in which they claim a storage.
_DEEPSPEED = {
    "bit16_groups_flat": "weights",
    "fp16_groups_flat": "weights",
    "bf16_groups_flat": "weights",
    "fp16_partitioned_groups_flat": "weights",
    "single_partition_of_fp32_groups": "master weights",
    "fp32_groups_flat": "master weights",
    "fp32_groups": "master weights",
    "fp32_groups_flat_partition": "master weights",
    "fp32_partitioned_groups_flat": "master weights",
    "averaged_gradients": "gradients",
    "all_grad_tensors": "gradients",
    "grads_in_partition": "gradients",
    "grad_partitions_flat_buffer": "gradients",
    "fp32_groups_gradients": "gradients",
    "fp32_groups_gradients_flat": "gradients",
}


def inventory(model: nn.Module | None, optimizer: Any) -> list[Known]:
    """All storages of a model and its optimizer, each once.

    Args:
        model: whose parameters, buffers and gradients to count; under ZeRO stage 3 and FSDP2 a parameter's shard is a
            weight, and the whole of it, while gathered, a communication buffer.
        optimizer: a torch optimizer, :class:`ds_mofa.MoFaSGD`, or an optimizer that DeepSpeed built; or None.
    """
    seen: dict[tuple[str, int], Known] = {}
    for category, tensor in tensors(model, optimizer):
        _claim(seen, tensor, category)
    return list(seen.values())


def buckets(model: nn.Module | None, optimizer: Any) -> list[Known]:
    """The short-lived part of :func:`inventory`: gradients, buckets, gathered weights, what waits to be sketched. Cheap
    enough for a hook.
    """
    seen: dict[tuple[str, int], Known] = {}
    for category, tensor in _short_lived(model, unwrap_optimizer(optimizer)):
        _claim(seen, tensor, category)
    return list(seen.values())


def sizes(known: Iterable[Known], device: str) -> dict[str, int]:
    """Bytes by category on one type of device."""
    total: dict[str, int] = {}
    for storage in known:
        if storage.device == device:
            total[storage.category] = total.get(storage.category, 0) + storage.size
    return total


def unwrap_optimizer(optimizer: Any) -> Any:
    """What Accelerate and HF's Trainer have wrapped, or the optimizer itself."""
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    return optimizer


def tensors(model: nn.Module | None, optimizer: Any) -> Iterator[tuple[str, Any]]:
    """(category, tensors in whatever nesting) of everything that :func:`inventory` counts, in its order."""
    optimizer = unwrap_optimizer(optimizer)
    for param in parameters(model) if model is not None else ():
        if not hasattr(param, "ds_tensor"):
            yield "weights", param.data
        else:
            yield "weights", param.ds_tensor
            yield "weights", getattr(param, "ds_secondary_tensor", None)
    for buffer in model.buffers() if model is not None else ():
        yield "weights", buffer
    for name, category in _DEEPSPEED.items():
        yield category, getattr(optimizer, name, None)
    yield from _short_lived(model, optimizer)
    mofa = getattr(optimizer, "mofa", optimizer)  # DeepSpeed's optimizers carry it, a plain loop has it itself
    matrices = _matrices(mofa)
    if matrices is not None:
        yield "sketches", [matrices.sketches, matrices._pending]
        yield "factors", [matrices.factors, matrices.working, *matrices.held()]
        yield "master weights", matrices.masters.tensors
    for base in _base_optimizers(optimizer):
        adam = "adam" in type(base).__name__.lower()
        yield "AdamW states" if adam else "other optimizer states", list(base.state.values())


def _short_lived(model: nn.Module | None, optimizer: Any) -> Iterator[tuple[str, Any]]:
    # Linears whose sketches are taken together keep their inputs and output gradients until then.
    matrices = _matrices(getattr(optimizer, "mofa", optimizer))
    for _, x, dy in getattr(getattr(matrices, "_queue", None), "_waiting", ()):
        yield "activations", x
        yield "workspace", dy
    # Before the gradients: one that waits for its reduction is a view of the bucket.
    for bucket in (getattr(optimizer, "ipg_buckets", None) or {}).values():
        yield "communication buffers", getattr(bucket, "buffer", None)
    if model is not None:
        yield from held_by_fsdp2(model)
    for param in parameters(model) if model is not None else ():
        yield "gradients", param.grad
        yield "gradients", getattr(param, "grad_accum", None)
        if hasattr(param, "ds_tensor"):
            yield "communication buffers", param.data
    for name in ("averaged_gradients", "all_grad_tensors", "grads_in_partition"):
        yield "gradients", getattr(optimizer, name, None)
    for name, category in _DEEPSPEED.items():
        if category == "master weights":
            yield "gradients", [master.grad for master in leaves(getattr(optimizer, name, None))]


def leaves(item: Any) -> list[Tensor]:
    """Every tensor with memory in a tensor, list, tuple or dict, of a DTensor the local one; nothing of anything else."""
    if isinstance(item, Tensor):
        return list(with_memory(item))
    parts = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def _matrices(optimizer: Any) -> MatrixStep | None:
    """None where it has still to be bound: that is not for the profiler to bring about."""
    return getattr(optimizer, "_matrices", None)


def _base_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside, whose ``state`` holds the moments. Not ds_mofa's own, which makes them when asked."""
    seen = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        plain = isinstance(optimizer, torch.optim.Optimizer) and not isinstance(optimizer, MatrixOptimizer)
        if plain and isinstance(getattr(optimizer, "state", None), dict):
            yield optimizer
        optimizer = getattr(optimizer, "adamw", None) or getattr(optimizer, "optimizer", None)


def _claim(seen: dict[tuple[str, int], Known], item: Any, category: str) -> None:
    """Add every storage in ``item`` that nothing has claimed yet."""
    for tensor in leaves(item):
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            continue
        storage = tensor.untyped_storage()
        key = (tensor.device.type, storage.data_ptr())
        if storage.nbytes() and key not in seen:
            seen[key] = Known(key[1], storage.nbytes(), category, key[0])
