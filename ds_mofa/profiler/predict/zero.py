"""The settings of DeepSpeed's ZeRO (0.19) that decide its memory, and how it cuts groups into partitions."""

import dataclasses
from collections.abc import Sequence

from ds_mofa.adamw_8bit import moment_bytes
from ds_mofa.profiler.predict.simulated.micro_batch import Parameter
from ds_mofa.profiler.setting import RunSetting

__all__ = ["ZeroSettings", "norm_bytes", "partitioned", "scattered", "zero_settings"]


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

    stage: int | None  # None: no ZeRO
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


def zero_settings(setting: RunSetting) -> ZeroSettings:
    """What a run sets, and what ds_mofa does in its own way where its optimizers run in stages 1 and 2."""
    ours = setting.entry is not None and setting.zero in (1, 2)
    once = setting.zero == 1 or (ours and setting.option("adamw_reduce") == "step")
    return ZeroSettings(
        stage=setting.zero,
        world_size=setting.gpus,
        reduces_once=once and setting.micro_batches > 1,
        scatters=ours and once,
        norm_in_pieces=ours,
        host_in_pieces=ours,
        host_at_once=ours,
        state_bytes=4 if setting.states == "fp32" else 2,
        eight_bit=setting.option("adamw_states") == "8bit",
        reduce_bucket_size=setting.bucket,
        contiguous_gradients=setting.contiguous,
        overlap_comm=setting.overlap,
        stage3_prefetch_bucket_size=setting.prefetch,
        leaf_module=setting.leaf,
        head_read_outside=setting.liger and not setting.option("fused_head"),
    )
