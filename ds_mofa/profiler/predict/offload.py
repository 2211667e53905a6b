"""Offload in the prediction: what DeepSpeed (0.19) still has on the GPU when state is on the host, and what there.

Gradients do not stay: each is added up on the host, and in the step's last micro-batch normed and converted on the GPU
on its way there, by DeepSpeed in whole, by :mod:`ds_mofa.backends.deepspeed.gradients` in pieces (stages 1 and 2).
Sizes in bytes, of one rank.
"""

from collections.abc import Sequence

from ds_mofa.profiler.predict.candidate import Candidate
from ds_mofa.profiler.predict.reserved.gathering import gathered
from ds_mofa.profiler.predict.simulated.micro_batch import MicroBatch, Moment, Parameter
from ds_mofa.profiler.predict.zero import ZeroSettings, norm_bytes, partitioned

__all__ = ["host_bytes", "offloaded_candidates"]

_NORMPIECE = 250_000_000  # elements: stage 3 takes a norm of so many at a time


def offloaded_candidates(
    zero: ZeroSettings, groups: Sequence[Sequence[Parameter]], batch: MicroBatch, micro_batches: int, rank: int
) -> list[Candidate]:
    """Moments of a rank's backward and step with ``offload_optimizer``, stages 1 to 3.

    A gradient is reduced when the next one does not fit into its bucket; one larger than the bucket waits until then
    where it is, in stages 1 and 2 as a copy, which is made while autograd still holds the original. DeepSpeed lets it
    live, in all but the step's last micro-batch, until the backward ends; :mod:`ds_mofa.backends.deepspeed.gradients`
    does not, and on one rank in stage 2 neither copies it nor lets it wait. There is also a buffer of the largest
    parameter, or of a piece, that brings what the host has added up. In stage 3 that copy is of a shard.
    """
    trained = {p.name: p for group in groups for p in group}
    mine = dict(partitioned(groups, zero.world_size)[0][rank])
    if zero.stage == 3:
        mine = {name: p.numel // zero.world_size for name, p in trained.items()}
        always = {"communication buffers": 2 * zero.reduce_bucket_size + gathered(zero, batch.parameters).at_loss}
    else:
        buckets = (2 if zero.overlap_comm else 1) * 2 * zero.reduce_bucket_size
        always = {"communication buffers": buckets + 2 * _at_a_time(zero, max(p.numel for p in trained.values()))}
    accumulated = zero.stage == 1 and micro_batches > 1
    candidates: list[Candidate] = []
    whole = 2 * sum(p.numel for p in trained.values()) if accumulated else 0
    straight = zero.host_at_once and zero.stage == 2 and zero.world_size == 1 and zero.contiguous_gradients
    lives = zero.stage == 2 and micro_batches > 1 and not zero.host_at_once
    bucket: list[str] = []
    there = 0  # what the host has already; in the last micro-batch, the one that converts, it is gone

    def candidate(when: str, moment: Moment, gradients: int, workspace: int = 0) -> None:
        extra = {"gradients": gradients, "activations": moment.activations, "workspace": moment.workspace + workspace}
        candidates.append(Candidate(when, {**always, **extra}))

    def waiting() -> int:
        return sum(2 * trained[name].numel for name in bucket if trained[name].numel > zero.reduce_bucket_size)

    def reduce(moment: Moment) -> None:
        nonlocal there
        passing = max(_passing(zero, mine.get(name, 0)) for name in bucket)
        candidate(f"backward, on the way to the host ({bucket[-1]})", moment, whole + waiting(), passing)
        there += waiting() if lives and mine.keys() & set(bucket) else 0
        bucket.clear()

    for peak, completion in batch.stretches():
        candidate("backward" if peak.completed else "loss", peak, whole + there + waiting())
        if completion is None or completion[0] not in trained:
            continue
        name, moment = completion
        if straight and trained[name].numel > zero.reduce_bucket_size:
            own, passing = 2 * trained[name].numel, _passing(zero, mine[name])
            candidate(f"backward, straight to the host ({name})", moment, own, passing)
            continue
        if bucket and sum(trained[one].numel for one in bucket) + trained[name].numel > zero.reduce_bucket_size:
            reduce(moment)
        bucket.append(name)
        whole -= 2 * trained[name].numel if accumulated else 0
        candidate(f"backward ({name})", moment, whole + there + waiting(), _original(zero, trained[name].numel))
    if bucket:
        reduce(batch.at_completion[-1])
    return [*candidates, Candidate("step", {} if zero.stage == 3 else always)]


def _original(zero: ZeroSettings, elements: int) -> int:
    """What autograd holds of a gradient, while its copy is made."""
    return 2 * elements if zero.stage != 3 and elements > zero.reduce_bucket_size else 0


def _at_a_time(zero: ZeroSettings, elements: int) -> int:
    """Of a gradient or parameter, what is moved at once."""
    from ds_mofa.backends.deepspeed.gradients.pieces import PIECE  # no other run needs DeepSpeed

    return min(elements, PIECE) if zero.host_in_pieces else elements


def _passing(zero: ZeroSettings, elements: int) -> int:
    """Of one gradient on its way: what its norm is taken of, or its conversion to the masters' dtype."""
    converted = zero.state_bytes * _at_a_time(zero, elements) if zero.state_bytes != 2 else 0
    if zero.stage == 3:
        return 2 * elements + max(norm_bytes(min(elements, _NORMPIECE)), converted)
    return max(0 if zero.norm_in_pieces else norm_bytes(elements), converted)


def host_bytes(
    zero: ZeroSettings, groups: Sequence[Sequence[Parameter]], weights: int, segment: int, rank: int, parameters: bool
) -> int:
    """Host memory of one rank, besides what the process has anyway.

    Of AdamW's share: master and both moments, its gradient in their dtype, and 16-bit copies of weights and gradients.
    Stages 1 and 2 add gradients up in whole, and have a buffer of the largest. Page-locked memory is rounded up to
    powers of two by PyTorch, which is not counted.

    Args:
        weights: elements of the whole model.
        segment: elements of this rank's factors.
        parameters: ``offload_param`` too.
    """
    touched, sizes = partitioned(groups, zero.world_size)
    trained = {p.name: p.numel for group in groups for p in group}
    share = 4 * zero.state_bytes * sum(sizes)
    if zero.stage == 3:
        share += 2 * sum(sizes)  # gradients
        share += 2 * (weights // zero.world_size) if parameters else 0
    else:
        share += 2 * sum(sizes) + 2 * sum(trained[name] for name in touched[rank]) + 2 * max(trained.values())
    return share + 4 * segment
