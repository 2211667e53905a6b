"""What DeepSpeed's ZeRO (0.19) allocates besides the model: partitions, buckets, copies, and when.

Read off its sources; each function says which of its buffers it counts. Sizes in bytes, per rank, of the fullest rank.
"""

import dataclasses
from collections.abc import Sequence

from ds_mofa.adamw_8bit import moment_bytes
from ds_mofa.profiler.simulate import MicroBatch, Moment, Parameter

__all__ = [
    "Candidate",
    "ZeroSettings",
    "norm_bytes",
    "partitioned",
    "scattered",
    "stage12_candidates",
    "stage3_step",
]


@dataclasses.dataclass(frozen=True)
class ZeroSettings:
    """Of ``zero_optimization`` in DeepSpeed's JSON, under their names there; sizes in elements.

    Five are not DeepSpeed's, but of :mod:`ds_mofa.deepspeed.gradients`.

    Attributes:
        reduces_once: gradients add up whole, where autograd puts them, until the last micro-batch of a step of several.
            So they do in stage 1, and in stage 2 those that ds_mofa holds back (its option ``adamw_reduce``).
        scatters: a parameter that fills its group and divides evenly is reduced straight into the partitions.
        norm_in_pieces: the norm of the gradients is taken without a copy of them (stages 1 and 2).
        host_in_pieces: with offload, gradients go to the host and come back by pieces (stages 1 and 2).
        host_at_once: with offload, a gradient that the host has is gone, and on one rank a large one is not copied
            before (stage 2).
    """

    stage: int
    world_size: int
    reduces_once: bool = False
    scatters: bool = False
    norm_in_pieces: bool = False
    host_in_pieces: bool = False
    host_at_once: bool = False
    state_bytes: int = 4  # of one number of the master weights and of each moment: 4, or 2 for bf16 states
    eight_bit: bool = False  # the moments, of MoFaSGD's AdamW
    reduce_bucket_size: int = 100_000_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_prefetch_bucket_size: int = 100_000_000
    leaf_module: bool = False  # whether a layer is gathered as one
    head_read_outside: bool = False  # the model reads the output head's weight itself, for liger-kernel's loss
    sub_group_size: int = 1_000_000_000
    overlap_comm: bool = True
    contiguous_gradients: bool = True

    def moment_bytes(self, elements: int) -> int:
        """Of one moment of a partition of so many elements."""
        return moment_bytes(elements) if self.eight_bit else self.state_bytes * elements


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A moment that may be the peak: bytes by category on top of what is always there."""

    when: str
    extra: dict[str, int]


def partitioned(groups: Sequence[Sequence[Parameter]], world_size: int) -> tuple[list[dict[str, int]], list[int]]:
    """(by rank, the parameters that its partitions touch, with the elements in them; elements of a partition by group).

    Stages 1 and 2 cut each group's flat buffer into equal ranges, and keep whole the gradient of a parameter that a cut
    goes through, on both sides of it.
    """
    touched: list[dict[str, int]] = [{} for _ in range(world_size)]
    sizes = []
    for group in groups:
        size = -(-sum(p.numel for p in group) // world_size)
        sizes.append(size)
        start = 0
        for param in group:
            end = start + param.numel
            for rank in range(start // size, min(world_size - 1, (end - 1) // size) + 1):
                touched[rank][param.name] = min(end, (rank + 1) * size) - max(start, rank * size)
            start = end
    return touched, sizes


def scattered(zero: ZeroSettings, groups: Sequence[Sequence[Parameter]]) -> frozenset[str]:
    """Names of the parameters whose gradient is reduce-scattered: DeepSpeed pads partitions to pairs of elements."""
    if not zero.scatters or zero.world_size == 1:
        return frozenset()
    alone = [group[0] for group in groups if len(group) == 1]
    return frozenset(param.name for param in alone if param.numel % (2 * zero.world_size) == 0)


def norm_bytes(elements: int) -> int:
    """Of the float64 copy of a gradient that DeepSpeed takes its norm of, one after the other, before each step."""
    return 8 * elements


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
    for peak, name, moment in zip(batch.peaks, [*batch.order, None], [*batch.at_completion, None]):
        candidate("backward" if peak.completed else "loss", peak, before + filled + waiting)
        param = trained.get(name)
        if param is None:
            continue
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


def stage3_step(zero: ZeroSettings, sharded: int) -> int:
    """Bytes of gradients at the step: all shards in 16 bits, and of one sub-group a copy in the masters' dtype and one
    flat in 16 bits. ``sharded``: elements of this rank's shard of what AdamW trains.
    """
    part = min(sharded, zero.sub_group_size)
    return 2 * sharded + 2 * part + (zero.state_bytes * part if zero.state_bytes != 2 else 0)
