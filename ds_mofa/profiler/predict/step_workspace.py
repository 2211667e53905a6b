"""Temporaries of the optimizer step, in bytes, of one rank."""

from ds_mofa.host_weights import CHUNK_BYTES
from ds_mofa.options import Options
from ds_mofa.partition import Layout
from ds_mofa.profiler.setting import Setting
from ds_mofa.profiler.simulate import MicroBatch
from ds_mofa.subbatches import Part, split, temporaries

__all__ = ["layout_of", "sign_bytes", "state_layout_of", "step_workspace"]


def layout_of(setting: Setting, batch: MicroBatch) -> Layout:
    """Where MoFaSGD's sketches and working copies lie."""
    return Layout(_places(batch), setting.rank + setting.explore, setting.gpus)


def state_layout_of(setting: Setting, batch: MicroBatch) -> Layout:
    """Where its fp32 factors do."""
    return Layout(_places(batch), setting.rank, setting.gpus)


def sign_bytes(setting: Setting, batch: MicroBatch) -> int:
    """Of the random signs that a rank keeps: for 32 of them a word, and its number (ds_mofa.rules.exploration)."""
    return sum(8 * -(-setting.explore * rows // 32) for shape, _ in _places(batch) for rows in shape)


def _places(batch: MicroBatch) -> list[tuple[tuple[int, int], int]]:
    return [((p.shape[0], p.shape[1]), 0) for p in batch.parameters if p.kind == "matrix"]


def step_workspace(setting: Setting, batch: MicroBatch) -> int:
    """Temporaries of the optimizer step; a fused AdamW has none."""
    matrices = [p for p in batch.parameters if p.kind == "matrix"]
    if setting.optimizer == "MoFaSGD":
        layout = layout_of(setting, batch)
        batches = [
            parts for rank in range(setting.gpus) for parts in split(layout.owned_by(rank), Options().update_bytes)
        ]
        staged = 2 * max(_factor_bytes(parts, setting.rank) for parts in batches) if setting.offload else 0
        staged = max(staged, 2 * CHUNK_BYTES) if setting.offload == "param" else staged
        return 4 * layout.segment + staged + max(map(temporaries, batches))  # the reduced sketches, and the update's
    if setting.optimizer == "Muon":  # Newton-Schulz in bf16: the update, its Gram matrix twice, one product
        return max(2 * (2 * p.numel + 2 * min(p.shape) ** 2) for p in matrices)
    if setting.optimizer == "GaLore":  # the update projected back, and an SVD's fp32 copy of one gradient
        return max(6 * p.numel for p in matrices)
    return 0


def _factor_bytes(parts: list[Part], rank: int) -> int:
    """Of the factors of one sub-batch, which is what a buffer for offloaded ones holds."""
    return sum(4 * len(part.members) * rank * (sum(part.block.shape) + 1) for part in parts)
