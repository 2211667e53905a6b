"""How much an optimizer keeps."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_mofa.optimizers.base import MatrixOptimizer

__all__ = ["state_bytes"]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that the optimizer keeps from step to step, besides weights and gradients.

    Of MoFaSGD these are factors, working copies, the signs of ``explore``, masters and AdamW's moments; its sketches
    stand instead of gradients. The fp32 ``masters`` that an optimizer of gradients has been given count too.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _kept(optimizer))


def _kept(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    if isinstance(optimizer, MatrixOptimizer):
        yield from (optimizer.matrices.factors, optimizer.matrices.working, *optimizer.matrices.held())
        yield from optimizer.matrices.masters.state_dict().values()
        optimizer = optimizer.adamw
    for part in getattr(optimizer, "parts", [optimizer] if optimizer is not None else []):
        yield from getattr(part, "masters", {}).values()
        for state in part.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
