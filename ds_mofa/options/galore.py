"""The options of GaLore's rule, and all that GaLore takes."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from ds_mofa.options.checks import Checked, check_integer, check_number, check_pair
from ds_mofa.options.optimizer import OptimizerOptions

__all__ = ["GaLoreOptions", "GaLoreRuleOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaLoreRuleOptions(Checked):
    """What :class:`ds_mofa.rules.galore.GaLoreRule` may be told.

    Attributes:
        refresh_every: T, steps between two subspaces, >= 1; 200 in the paper's training from scratch, 500 on GLUE.
        alpha: scale of the update, > 0; the paper's 0.25.
        betas: of Adam's moments of the projected gradient.
        eps: added to its denominator, > 0.
    """

    refresh_every: int = 200
    alpha: float = 0.25
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self):
        check_integer("refresh_every", self.refresh_every, low=1, high=2**31)
        check_number("alpha", self.alpha, low=0, open_low=True)
        check_pair("betas", self.betas, low=0, high=1)
        check_number("eps", self.eps, low=0, open_low=True)
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaLoreOptions(GaLoreRuleOptions, OptimizerOptions):
    """The options of GaLore: :class:`GaLoreRuleOptions` and, as for MoFaSGD, :class:`~ds_mofa.options.CommonOptions`
    and :class:`~ds_mofa.options.AdamWOptions`. Some of these have other defaults here, or a narrower meaning.

    Attributes:
        lr: learning rate of the matrices, > 0. What counts is lr alpha: 2.5e-3
            in the paper's training from scratch, 1.2e-4 on GLUE, which is the default.
        rank: r, directions of each matrix's subspace. With s = min(m, n) and l = max(m, n) the state of all ranks
            together is 4 (s r + 2 l r + 1) bytes a matrix.
        adamw_betas: None: ``betas``.
        adamw_eps: None: ``eps``.

    Raises:
        OptionError: a value out of its range or of the wrong type, or an unknown name.
    """

    title: ClassVar[str] = "GaLore"

    lr: float = 4.8e-4
    # None is what a user may give; the object has the number.
    adamw_betas: Sequence[float] | None = None  # type: ignore[assignment]
    adamw_eps: float | None = None  # type: ignore[assignment]

    def __post_init__(self):
        for name in ("betas", "eps"):
            if getattr(self, f"adamw_{name}") is None:
                object.__setattr__(self, f"adamw_{name}", getattr(self, name))
        super().__post_init__()
