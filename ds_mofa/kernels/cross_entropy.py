"""The cross-entropy of rows of logits, and its gradient in their place; on a GPU one launch."""

import torch
from torch import Tensor

from ds_mofa.kernels import triton_serves

__all__ = ["BLOCK_BYTES", "cross_entropy", "in_blocks"]

BLOCK_BYTES = 1 << 26  # of the fp32 blocks in which the twin takes the softmax


def cross_entropy(logits: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
    """Each row's loss; with ``factors`` its gradient, times the row's factor, takes the place of the logits.

    Args:
        logits: (t, m), contiguous.
        targets: (t,), int64, below m.
        factors: (t,), in the dtype of the losses.

    Returns:
        (t,), at least fp32.
    """
    return torch.ops.ds_mofa.cross_entropy(logits, targets, factors)


def in_blocks(logits: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
    """:func:`cross_entropy` in PyTorch, with two fp32 blocks of ``BLOCK_BYTES`` (one row's logits, if that is more)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(len(logits), dtype=wide, device=logits.device)
    step = max(1, BLOCK_BYTES // (logits.shape[-1] * wide.itemsize))
    for first in range(0, len(logits), step):
        own = slice(first, first + step)
        losses[own] = _block(logits[own], targets[own], None if factors is None else factors[own])
    return losses


def _block(logits: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
    wide = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    at = targets[:, None]
    losses = -wide.gather(1, at).squeeze(1)
    if factors is not None:
        wide.exp_()
        wide.scatter_(1, at, wide.gather(1, at) - 1)
        torch.mul(wide, factors[:, None], out=logits)  # rounded as it is written
    return losses


# An operator: what a simulation counts of it is what the kernel takes, which is nothing beside the losses.
_library = torch.library.Library("ds_mofa", "FRAGMENT")
_library.define(
    "cross_entropy(Tensor(a!) logits, Tensor targets, Tensor? factors) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _cross_entropy(logits: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
    if not triton_serves(logits):
        return in_blocks(logits, targets, factors)
    from ds_mofa.kernels import _cross_entropy as kernel

    return kernel.launch(logits, targets, factors)


def _fake(logits: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.promote_types(logits.dtype, torch.float32))


_library.impl("cross_entropy", _cross_entropy, "CompositeExplicitAutograd")
torch.library.register_fake("ds_mofa::cross_entropy", _fake, lib=_library)
