"""GaLore (arXiv 2403.03507) on MoFaSGD's machinery: no gradient of a matrix is ever stored, and it runs under ZeRO."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed import ProcessGroup

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.registry import register
from ds_mofa.options import AdamWReduce, AdamWStates, CaptureMode, GaLoreOptions, Rounding, Weights
from ds_mofa.rules.galore import GaLoreRule

__all__ = ["GaLore"]


@register
class GaLore(MatrixOptimizer):
    """GaLore for the matrices of a model, AdamW for everything else.

    As :class:`ds_mofa.MoFaSGD`, in a plain PyTorch loop or as ``"type": "GaLore"`` in DeepSpeed's JSON, at every ZeRO
    stage. Its options are :class:`ds_mofa.options.GaLoreOptions`, its maths, and where it differs from the paper's,
    :mod:`ds_mofa.rules.galore`.
    """

    options_class = GaLoreOptions
    rule_class = GaLoreRule

    if TYPE_CHECKING:  # for editors and type checkers; a test compares it with the options' class, which counts

        def __init__(
            self,
            params: nn.Module | Iterable[Any],
            *,
            model: nn.Module | None = None,
            process_group: ProcessGroup | None = None,
            lr: float = 4.8e-4,
            rank: int = 8,
            weight_decay: float = 0.0,
            rounding: Rounding = "stochastic",
            master_weights: bool = False,
            weights: Weights | None = None,
            capture: CaptureMode = "linear",
            include: Sequence[str] = (),
            exclude: Sequence[str] = (),
            fused_head: bool = False,
            fp8: bool = False,
            update_bytes: float = 2e9,
            seed: int = 0,
            adamw_lr: float | None = None,
            adamw_betas: Sequence[float] | None = None,
            adamw_eps: float | None = None,
            adamw_weight_decay: float | None = None,
            adamw_reduce: AdamWReduce = "step",
            adamw_states: AdamWStates = "full",
            refresh_every: int = 200,
            alpha: float = 0.25,
            betas: Sequence[float] = (0.9, 0.999),
            eps: float = 1e-8,
        ): ...
