"""MoFaSGD (arXiv 2507.08091) as users construct it."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed import ProcessGroup

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.registry import register
from ds_mofa.options import AdamWReduce, AdamWStates, AdjustLr, CaptureMode, Options, Rounding, UpdateRule, Weights
from ds_mofa.rules.mofasgd import MoFaSGDRule

__all__ = ["MoFaSGD"]


@register
class MoFaSGD(MatrixOptimizer):
    """Momentum-factorized SGD for the matrices of a model, AdamW for everything else.

    In a plain PyTorch loop, with no DeepSpeed:

    >>> optimizer = MoFaSGD(model, lr=1e-4, rank=8)
    >>> loss.backward()          # no weight matrix gets a .grad
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Under DeepSpeed, ``"optimizer": {"type": "MoFaSGD", "params": {...}}`` in the JSON builds it. Its options are
    :class:`ds_mofa.options.Options`, its other arguments those of :class:`MatrixOptimizer`.
    """

    options_class = Options
    rule_class = MoFaSGDRule

    if TYPE_CHECKING:  # for editors and type checkers; a test compares it with the options' class, which counts

        def __init__(
            self,
            params: nn.Module | Iterable[Any],
            *,
            model: nn.Module | None = None,
            process_group: ProcessGroup | None = None,
            lr: float = 1e-4,
            rank: int = 32,
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
            adamw_betas: Sequence[float] = (0.9, 0.999),
            adamw_eps: float = 1e-8,
            adamw_weight_decay: float | None = None,
            adamw_reduce: AdamWReduce = "step",
            adamw_states: AdamWStates = "full",
            beta: float = 0.85,
            adjust_lr_fn: AdjustLr | None = None,
            update_rule: UpdateRule = "spectral",
            inverse_sigma_clamp: float = 1e4,
            balance: float = 0.0,
            explore: int = 32,
            explore_scale: float = 1.0,
            diagnostics_every: int = 0,
        ): ...
