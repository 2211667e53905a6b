"""The moments of a step that may be its peak: the loss, each completed gradient, each reduction, the optimizer step.

Each with the bytes by category that are there besides :func:`ds_mofa.profiler.predict.always.always`.
"""

import dataclasses

from ds_mofa.profiler.predict.always import on_a_rank, weight_bytes
from ds_mofa.profiler.predict.candidate import Candidate
from ds_mofa.profiler.predict.offload import offloaded_candidates
from ds_mofa.profiler.predict.plan import Plan
from ds_mofa.profiler.predict.reserved.gathering import gathered
from ds_mofa.profiler.predict.simulated.micro_batch import Parameter
from ds_mofa.profiler.predict.stage12 import stage12_candidates
from ds_mofa.profiler.predict.step_workspace import step_workspace
from ds_mofa.profiler.predict.zero import ZeroSettings, norm_bytes

__all__ = ["candidates", "highest"]


def highest(plan: Plan, process: int | None = None) -> tuple[Candidate, int]:
    """The highest moment, and on which rank it is; all are looked at where ``process`` is None and they differ."""
    every = range(plan.setting.gpus) if plan.setting.zero in (1, 2) else (0,)
    each = (
        (max(candidates(plan, rank), key=lambda one: sum(one.extra.values())), rank)
        for rank in (every if process is None else (process,))
    )
    return max(each, key=lambda found: sum(found[0].extra.values()))


def candidates(plan: Plan, process: int) -> list[Candidate]:
    """All moments of one rank."""
    setting = plan.setting
    if setting.offload and not setting.sharded:
        found = offloaded_candidates(plan.zero, plan.groups, plan.batch, setting.micro_batches, process)
    elif setting.zero in (1, 2):
        found = stage12_candidates(plan.zero, plan.groups, plan.batch, setting.micro_batches, process)
    else:
        found = _other_candidates(plan)
    step = step_workspace(plan)
    return [
        dataclasses.replace(c, extra={**c.extra, "workspace": c.extra.get("workspace", 0) + step})
        if c.when == "step"
        else c
        for c in found
    ]


def _other_candidates(plan: Plan) -> list[Candidate]:
    """A plain loop, DDP (gradients are views of its buckets, which stay; so do those of CUDA graphs), FSDP2 (what it gathers
    and reduces in is in the micro-batch), stage 0 (fp32 gradients at the step) and stage 3 (a flat buffer of gradient shards,
    one bucket).
    """
    setting, batch, zero = plan.setting, plan.batch, plan.zero
    sizes = {p.name: gradient_bytes(plan, p) for p in plan.trained}
    whole = sum(sizes.values())
    fixed = {}
    if setting.zero == 3:
        fixed["communication buffers"] = 2 * zero.reduce_bucket_size + gathered(zero, batch.parameters).at_loss
    found, complete = [], 0
    for i, moment in enumerate(batch.peaks):
        if i:
            complete += sizes.get(batch.order[i - 1], 0)
        if setting.zero == 3:
            gradients = whole // setting.gpus
        else:
            kept = setting.micro_batches > 1 or setting.backend == "ddp" or setting.graphed
            gradients = whole if kept else complete
        extra = {"activations": moment.activations, "workspace": moment.workspace, "gradients": gradients}
        extra["communication buffers"] = moment.communication
        found.append(Candidate("backward" if moment.completed else "loss", {**extra, **fixed}))
    step = {"gradients": whole}
    if setting.zero == 0:
        step["gradients"] += 2 * whole  # DeepSpeed converts all of them to fp32 before it steps
    if setting.zero == 3:
        step["gradients"] = _stage3_step(zero, whole // 2 // setting.gpus)
        largest = max((size // 2 for size in sizes.values()), default=0) // setting.gpus
        norm = {"gradients": whole // setting.gpus, "workspace": norm_bytes(largest)}
        found.append(Candidate("step, gradient norm", norm))
    return [*found, Candidate("step", step)]


def gradient_bytes(plan: Plan, parameter: Parameter) -> int:
    """Of a gradient as it is kept: whole, but under FSDP2, and not at all where that sends it to the host."""
    if not plan.setting.sharded:
        return 2 * parameter.numel
    return 0 if plan.setting.offload else weight_bytes(plan.setting) * on_a_rank(plan, [parameter])


def _stage3_step(zero: ZeroSettings, sharded: int) -> int:
    """Bytes of gradients at the step: all shards in 16 bits, and of one sub-group a copy in the masters' dtype and one
    flat in 16 bits. ``sharded``: elements of this rank's shard of what AdamW trains.
    """
    part = min(sharded, zero.sub_group_size)
    return 2 * sharded + 2 * part + (zero.state_bytes * part if zero.state_bytes != 2 else 0)
