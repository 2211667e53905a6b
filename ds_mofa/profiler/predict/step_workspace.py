"""Temporaries of the optimizer step, in bytes, of one rank."""

import functools
import math

from ds_mofa.partition.subbatches import Needs, split, temporaries
from ds_mofa.profiler.predict.plan import Plan
from ds_mofa.weights.host import CHUNK_BYTES

__all__ = ["step_workspace"]


def step_workspace(plan: Plan) -> int:
    """Of the matrices' update; a fused AdamW has none.

    Of a sub-batch what :func:`ds_mofa.partition.subbatches.temporaries` says, which is MoFaSGD's and more than GaLore's.
    """
    if plan.sketched:
        limit, ranks = plan.setting.option("update_bytes"), range(plan.owners)
        needs = functools.partial(temporaries, r=plan.rule.r)
        batches = [parts for rank in ranks for parts in split(plan.layout.owned_by(rank), limit, needs)]
        return 4 * plan.layout.segment + _staged(plan, limit, needs) + max(map(needs, batches))
    if plan.setting.optimizer == "Muon":  # Newton-Schulz in bf16: the update, its Gram matrix twice, one product
        return max(2 * (2 * p.numel + 2 * min(p.shape) ** 2) for p in plan.matrices)
    return 0


def _staged(plan: Plan, limit: float, needs: Needs) -> int:
    """The two buffers through which offloaded state comes, a sub-batch's at a time, and offloaded weights."""
    if not plan.setting.offload:
        return 0
    largest = 0
    for rank in range(plan.owners):
        states = dict(zip(plan.layout.owned_by(rank), plan.state_layout.owned_by(rank), strict=True))
        for parts in split(list(states), limit, needs):
            shapes = [(part.count, states[part.block].tensors) for part in parts]
            largest = max(largest, sum(4 * count * sum(map(math.prod, tensors)) for count, tensors in shapes))
    weights = CHUNK_BYTES if plan.setting.offload == "param" else 0
    return 2 * max(largest, weights)
