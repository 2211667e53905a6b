"""GaLore (arXiv 2403.03507) on MoFaSGD's machinery: no gradient of a matrix is ever stored, and it runs under ZeRO."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from ds_mofa.optimizer import MatrixOptimizer
from ds_mofa.optimizers.registry import register
from ds_mofa.options import OptionError, Options, check_integer, check_number
from ds_mofa.rules.galore import GaLoreRule

__all__ = ["GaLore", "GaLoreOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaLoreOptions(Options):
    """The options of GaLore: its own, and those of :class:`ds_mofa.options.Options` that are not of MoFaSGD's rule.

    Attributes:
        lr: learning rate of the matrices and, without ``adamw_lr``, of all else; > 0. What counts is lr alpha: 2.5e-3
            in the paper's training from scratch, 1.2e-4 on GLUE, which is the default.
        rank: r, directions of each matrix' subspace. With s = min(m, n) and l = max(m, n) the state of all ranks
            together is 4 (s r + 2 l r + 1) bytes a matrix.
        refresh_every: T, steps between two subspaces, >= 1; 200 in the paper's training from scratch, 500 on GLUE.
        alpha: scale of the update, > 0; the paper's 0.25.
        betas: of Adam's moments of the projected gradient.
        eps: added to its denominator, > 0.
        adamw_lr: None: lr.
        adamw_betas: None: ``betas``.
        adamw_eps: None: ``eps``.

    Raises:
        OptionError: a value out of its range or of the wrong type, or an unknown name.
    """

    title: ClassVar[str] = "GaLore"
    aliases: ClassVar[dict[str, str]] = {}
    foreign: ClassVar[frozenset[str]] = frozenset(
        {
            "beta",
            "adjust_lr_fn",
            "update_rule",
            "inverse_sigma_clamp",
            "balance",
            "explore",
            "explore_scale",
            "diagnostics_every",
        }
    )

    lr: float = 4.8e-4
    refresh_every: int = 200
    alpha: float = 0.25
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8
    adamw_betas: Sequence[float] | None = None
    adamw_eps: float | None = None

    def __post_init__(self):
        for name in ("betas", "eps"):
            if getattr(self, f"adamw_{name}") is None:
                object.__setattr__(self, f"adamw_{name}", getattr(self, name))
        check_integer("refresh_every", self.refresh_every, low=1, high=2**31)
        check_number("alpha", self.alpha, low=0, open_low=True)
        check_number("eps", self.eps, low=0, open_low=True)
        if isinstance(self.betas, str) or not isinstance(self.betas, Sequence) or len(self.betas) != 2:
            raise OptionError(f"betas={self.betas!r} must be two numbers, such as [0.9, 0.999]")
        for beta in self.betas:
            check_number("betas", beta, low=0, high=1)
        super().__post_init__()

    @property
    def adamw_lr_ratio(self) -> float:
        return 1.0 if self.adamw_lr is None else self.adamw_lr / self.lr


@register
class GaLore(MatrixOptimizer):
    """GaLore for the matrices of a model, AdamW for everything else.

    As :class:`ds_mofa.MoFaSGD`, in a plain PyTorch loop or as ``"type": "GaLore"`` in DeepSpeed's JSON, at every ZeRO
    stage. Its options are :class:`GaLoreOptions`, its maths, and where it differs from the paper's,
    :mod:`ds_mofa.rules.galore`.
    """

    options_class = GaLoreOptions
    rule_class = GaLoreRule
