"""What a run will reserve."""

from collections.abc import Mapping

from ds_mofa.adamw.eight_bit import moment_bytes
from ds_mofa.profiler.predict.always import (
    masters_are_weights,
    matrix_masters,
    on_a_rank,
    weight_bytes,
    weights_on_a_rank,
)
from ds_mofa.profiler.predict.moments import gradient_bytes
from ds_mofa.profiler.predict.plan import Plan
from ds_mofa.profiler.predict.reserved.gathering import gathered
from ds_mofa.profiler.predict.reserved.plain import reserved_by_plain_loop
from ds_mofa.profiler.predict.reserved.stage3 import reserved_by_stage3
from ds_mofa.profiler.predict.reserved.stage12 import reserved_by_stage12

__all__ = ["reserved"]


def reserved(plan: Plan, always: Mapping[str, int], process: int) -> int:
    """Bytes on one rank, where the allocator's rules can be replayed; 0 in stage 0 and with offload.

    Args:
        always: what is there all the time, by category.
        process: the rank.
    """
    setting, zero, batch = plan.setting, plan.zero, plan.batch
    if (setting.offload and not setting.sharded) or setting.zero == 0:
        return 0
    buffers = [always[name] for name in ("sketches", "factors", "other optimizer states") if name in always]
    buffers += [matrix_masters(plan)] if matrix_masters(plan) else []
    if setting.zero is None:
        each = weight_bytes(setting)
        held = [p for p in plan.trained if "other optimizer states" not in always or p.kind != "matrix"]
        weights, moments = [], []
        if not setting.offload:
            weights = [weights_on_a_rank(plan, [p]) for p in batch.parameters]
            shards = [on_a_rank(plan, [p]) for p in held]
            moments = [moment_bytes(size) if zero.eight_bit else each * size for size in shards for _ in range(2)]
        gradients = {p.name: gradient_bytes(plan, p) for p in held}
        if setting.backend == "ddp" and not setting.graphed:  # its buckets
            buffers, gradients = [*buffers, sum(gradients.values())], {}
        return reserved_by_plain_loop(batch, weights, gradients, moments, buffers, setting.micro_batches)
    if setting.zero in (1, 2):
        own = not masters_are_weights(plan)
        return reserved_by_stage12(
            zero, batch, plan.groups, buffers, setting.micro_batches, rank=process, own_masters=own
        )
    there = reserved_by_stage3(zero, batch, plan.groups, buffers, setting.micro_batches)
    return there + gathered(zero, batch.parameters).reserved
