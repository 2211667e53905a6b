"""The cross-entropy of a row of logits by one program. The twin is ``ds_mofa.kernels.cross_entropy.in_blocks``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_mofa.kernels import on_its_device

_BLOCK = 8192  # logits at a time


@on_its_device
def launch(logits: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
    """See :func:`ds_mofa.kernels.cross_entropy.cross_entropy`; logits of at most fp32."""
    t, m = logits.shape
    losses = torch.empty(t, dtype=torch.float32, device=logits.device)
    if t:
        block = min(_BLOCK, triton.next_power_of_2(m))
        given = factors is not None
        _kernel[(t,)](
            logits,
            targets,
            factors if given else losses,
            losses,
            M=m,
            GRADIENT=given,
            BLOCK=block,
            num_warps=8 if block > 1024 else 4,
        )
    return losses


@triton.jit
def _kernel(logits, targets, factors, losses, M: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * M
    at = tl.arange(0, BLOCK)
    # The largest so far of each lane, and the sum over it: lanes meet at the end alone.
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, M, BLOCK):
        x = tl.load(base + first + at, mask=first + at < M, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
        # A lane that has met nothing but -inf has no sum yet.
        sums = tl.where(higher == -float("inf"), 0.0, sums * tl.exp(largest - higher) + tl.exp(x - higher))
        largest = higher
    top = tl.max(largest, axis=0)
    total = tl.sum(tl.where(largest == -float("inf"), 0.0, sums * tl.exp(largest - top)), axis=0)
    normaliser = top + tl.log(total)
    target = tl.load(targets + row)
    tl.store(losses + row, normaliser - tl.load(base + target).to(tl.float32))
    if GRADIENT:
        factor = tl.load(factors + row).to(tl.float32)
        for first in tl.range(0, M, BLOCK):
            held = first + at < M
            x = tl.load(base + first + at, mask=held, other=0.0).to(tl.float32)
            share = tl.exp(x - normaliser)
            share = tl.where(first + at == target, share - 1.0, share)
            tl.store(base + first + at, (share * factor).to(logits.dtype.element_ty), mask=held)
