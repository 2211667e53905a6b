"""What DeepSpeed's ZeRO stages 1 and 2 (0.19) allocate besides the model: buckets, copies, and when.

Read off its sources. Sizes in bytes, of one rank.
"""

from collections.abc import Sequence

from ds_mofa.profiler.predict.candidate import Candidate
from ds_mofa.profiler.predict.simulated.micro_batch import MicroBatch, Moment, Parameter
from ds_mofa.profiler.predict.zero import ZeroSettings, norm_bytes, partitioned, scattered

__all__ = ["stage12_candidates"]


def stage12_candidates(
    zero: ZeroSettings, groups: Sequence[Sequence[Parameter]], batch: MicroBatch, micro_batches: int, rank: int
) -> list[Candidate]:
    """Moments of a rank's backward and step in stages 1 and 2, gradients in 16 bits.

    Backward. Stage 2 keeps, from one micro-batch to the next, one flat buffer of the gradients that this rank's
    partition touches (``grads_in_partition``), and fills another in each micro-batch, allocated when the first of them
    is reduced: at the beginning of backward on the rank that has the last layers, at its middle on one that has not.
    Where gradients are reduced once a step they stay whole, and with ``contiguous_gradients`` move, in the last
    micro-batch, through the buckets into such a buffer. A gradient larger than the bucket waits, whole, until the next
    one comes. One that is scattered passes neither: there is its partition, then it is gone; but the buffer has room
    for it.

    Step: :func:`norm_bytes`; then, group by group, a flat copy of the partition's gradients (a scattered one is flat),
    then its conversion to the masters' dtype, beside what the accumulated gradients still hold.
    """
    trained = {p.name: p for group in groups for p in group}
    touched, sizes = partitioned(groups, zero.world_size)
    apart = scattered(zero, groups)
    mine = {name: elements for name, elements in touched[rank].items() if name not in apart}
    whole = 2 * sum(p.numel for p in trained.values())
    kept = 2 * sum(trained[name].numel for name in mine)
    before = (whole if zero.reduces_once else kept) if micro_batches > 1 else 0
    buffers = (2 if zero.overlap_comm else 1) * 2 * zero.reduce_bucket_size if zero.contiguous_gradients else 0
    candidates = []

    def candidate(when: str, moment: Moment, gradients: int) -> None:
        extra = {"gradients": gradients, "communication buffers": buffers if moment.completed else 0}
        extra |= {"activations": moment.activations, "workspace": moment.workspace}
        candidates.append(Candidate(when, extra))

    waiting = leaving = elements = filled = 0
    reduces_mine = False
    for peak, completion in batch.stretches():
        candidate("backward" if peak.completed else "loss", peak, before + filled + waiting)
        if completion is None or completion[0] not in trained:
            continue
        name, moment = completion
        param = trained[name]
        size = 2 * param.numel
        own = 0 if zero.reduces_once else size  # or it is added to one that is there
        moved = size - own if zero.contiguous_gradients else 0
        if name in apart:
            part = size // zero.world_size
            candidate(f"backward ({name}, scattered)", moment, before + filled + waiting + own + part)
            before += part - (size - own)
            continue
        if elements and elements + param.numel > zero.reduce_bucket_size:
            filled = kept if zero.contiguous_gradients and (filled or reduces_mine) else 0
            candidate(f"backward, first reduction ({name})", moment, before + filled + waiting + own)
            before -= leaving
            waiting = leaving = elements = 0
            reduces_mine = False
        elements += param.numel
        reduces_mine |= name in mine
        if param.numel > zero.reduce_bucket_size:
            waiting, leaving = own, moved if name in mine or zero.stage == 2 else 0
        else:
            before -= moved
        candidate(f"backward ({name})", moment, before + filled + waiting)
    parts = sum(2 * trained[name].numel // zero.world_size for name in apart)
    largest = 0 if zero.norm_in_pieces else max(touched[rank].values(), default=0)
    candidates.append(Candidate("step, gradient norm", {"gradients": kept + parts, "workspace": norm_bytes(largest)}))
    pieces = sum(group[0].name not in apart for group in groups)  # groups whose gradients are in the buffer
    for group, size in zip(groups, sizes):
        converted = zero.state_bytes * size if zero.state_bytes != 2 else 0
        flat = 0 if group[0].name in apart else 2 * size
        candidates.append(Candidate("step", {"gradients": kept + parts + flat + converted}))
        if group[0].name in apart:
            parts -= 2 * size
        else:
            pieces -= 1
            kept = max(0, kept - flat) if pieces else 0
    return candidates
