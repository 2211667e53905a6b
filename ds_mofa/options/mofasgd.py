"""The options of MoFaSGD's rule, and all that MoFaSGD takes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ds_mofa.options.checks import Checked, OptionError, check_integer, check_number
from ds_mofa.options.optimizer import OptimizerOptions

__all__ = ["AdjustLr", "MoFaSGDRuleOptions", "Options", "UpdateRule"]

AdjustLr = Literal["adamw", "match_rms_adamw", "original", "none"]
UpdateRule = Literal["spectral", "inverse_sigma"]

# Above, AdamW trains toys alone, and the rates of earlier versions were not below 3e-3 by their guide.
_LARGEST_RATE = 2e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoFaSGDRuleOptions(Checked):
    """What :class:`ds_mofa.rules.mofasgd.MoFaSGDRule` may be told.

    Attributes:
        beta: decay of the momentum per step, 0 <= beta < 1 (the average weighs the gradient by 1 - beta).
        adjust_lr_fn: factor f on lr by shape: ``"adamw"`` sqrt(max(m, n)), with which lr is AdamW's (docs/learning/rates.md);
            or in the sense of ``torch.optim.Muon`` ``"match_rms_adamw"`` 0.2 sqrt(max(m, n)), ``"original"``
            sqrt(max(1, m / n)), ``"none"`` 1. None: ``"adamw"``, for an lr that AdamW may have, of at most 2e-3. Rates that
            were found by earlier versions are larger: ``"match_rms_adamw"`` was their default. m outputs and n
            inputs are the linear map's, also where a module keeps its weight transposed (transformers' Conv1D).
        update_rule: ``"spectral"``, W -= lr U V^T (the paper's equation), or ``"inverse_sigma"``,
            W -= lr U diag(1 / sigma) V^T with 1 / sigma at most ``inverse_sigma_clamp`` (what the paper's
            code runs).
        inverse_sigma_clamp: see ``update_rule``; > 0. With fp16 matrices at most 65504, with ``balance`` 6550.
        balance: p, 0 to 1. Each matrix's update is multiplied by (b / |sigma|)^p, b the geometric mean of all matrices'
            |sigma|: one whose gradients are small moves further, as it does under AdamW. At most by 10, at least by
            1 / 10. Costs an all-reduce of two numbers a step; 0 (the paper's rule) does without.
        explore: k, 0 or more. The momentum's r directions are joined by 2 k that it has not, new in each step: with
            random E (n x k) and F (m x k) the update is U V^T + s (A E^T + F B^T), A and B the polar factors of
            (1 - U U^T) G (1 - V V^T) E and of the same of G^T and F (:mod:`ds_mofa.linalg.exploring`). Sketches, working
            copies and the two collectives have r + k columns, the write to the weights r + 2 k; no state, and a
            checkpoint of a run with another k is taken as it is. Of an m x n matrix at most min(m, n) - r of the k
            have an effect. With ``update_rule`` "spectral" alone. 0 (the paper's rule) costs nothing, and is the default
            where ``rank`` is given; see :meth:`Options.completed`.
        explore_scale: s = ``explore_scale`` sqrt(min(m, n) / k), > 0: at 1, A E^T and F B^T are each as long as the
            update of a momentum of full rank would be. ``balance`` multiplies all of the update alike. With fp16
            matrices s, times 10 with ``balance``, is at most 65504.
        diagnostics_every: optimizer steps between two reports on every matrix (:mod:`ds_mofa.rules.diagnostics`), to
            DeepSpeed's monitor and ``optimizer.matrices.report``; 0 for none.
    """

    beta: float = 0.85
    adjust_lr_fn: AdjustLr | None = None
    update_rule: UpdateRule = "spectral"
    inverse_sigma_clamp: float = 1e4
    balance: float = 0.0
    explore: int = 0
    explore_scale: float = 1.0
    diagnostics_every: int = 0

    def __post_init__(self):
        check_number("beta", self.beta, low=0, high=1)
        check_number("inverse_sigma_clamp", self.inverse_sigma_clamp, low=0, open_low=True)
        check_number("balance", self.balance, low=0)
        if self.balance > 1:
            raise OptionError(f"balance={self.balance!r} must be a number from 0 to 1")
        check_integer("explore", self.explore, low=0, high=2**31)
        check_number("explore_scale", self.explore_scale, low=0, open_low=True)
        check_integer("diagnostics_every", self.diagnostics_every, low=0, high=2**31)
        super().__post_init__()
        if self.update_rule == "inverse_sigma" and self.adjust_lr_fn in (None, "adamw"):
            raise OptionError(
                'update_rule="inverse_sigma" makes steps whose length goes by the gradient, so lr cannot be AdamW\'s rate. Set '
                'adjust_lr_fn to "match_rms_adamw", "original" or "none", and search for lr and adamw_lr'
            )
        if self.explore and self.update_rule != "spectral":
            raise OptionError(
                f"explore={self.explore} with update_rule={self.update_rule!r}: what is explored has no momentum, "
                'and so no sigma to divide by. Set update_rule to "spectral", or explore to 0'
            )

    @property
    def gamma(self) -> float:
        """Weight of the gradient in the momentum's average."""
        return 1.0 - self.beta

    def shape_factor(self, m: int, n: int) -> float:
        """The factor on lr for a linear map of n inputs and m outputs, see ``adjust_lr_fn``."""
        if self.adjust_lr_fn in (None, "adamw"):
            return math.sqrt(max(m, n))
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(m, n))
        if self.adjust_lr_fn == "original":
            return math.sqrt(max(1.0, m / n))
        return 1.0

    def explore_length(self, m: int, n: int) -> float:
        """s for an m x n matrix, see ``explore_scale``."""
        return self.explore_scale * math.sqrt(min(m, n) / max(1, self.explore))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(MoFaSGDRuleOptions, OptimizerOptions):
    """The options of MoFaSGD: :class:`~ds_mofa.options.CommonOptions` and its rule's :class:`MoFaSGDRuleOptions` for
    the matrices, :class:`~ds_mofa.options.AdamWOptions` for everything else that is trained.

    Raises:
        OptionError: a value out of its range or of the wrong type, or an unknown name.
    """

    title: ClassVar[str] = "MoFaSGD"
    # A config whose "type" was AdamW a minute ago has these.
    aliases: ClassVar[Mapping[str, str]] = {"betas": "adamw_betas", "eps": "adamw_eps"}

    @classmethod
    def completed(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Without a rank: rank 32 and explore 32, which learns as AdamW does (docs/learning/settings.md). Who names a rank has
        that many directions and no more.
        """
        if "rank" in given:
            return dict(given)
        explores = given.get("update_rule", cls.update_rule) == "spectral"
        return {"rank": 32, **({"explore": 32} if explores else {}), **given}

    def __post_init__(self):
        super().__post_init__()
        self.check_rate(self.lr, "lr")
        if self.adjust_lr_fn not in (None, "adamw") and self.adamw_lr is None:
            raise OptionError(
                f"adjust_lr_fn={self.adjust_lr_fn!r} gives lr units of its own, so what AdamW trains needs a rate by itself: "
                f"write adamw_lr (in earlier versions it was lr / 10, {self.lr / 10:.3g}), or leave adjust_lr_fn out and "
                "give AdamW's rate as lr"
            )

    def check_rate(self, lr: float, name: str) -> None:
        if self.adjust_lr_fn is not None or not lr > _LARGEST_RATE:
            return
        raise OptionError(
            f"{name}={lr!r} is far above AdamW's rates, and lr is AdamW's rate. If it comes from an earlier version, where the "
            f"same step took 5 times as much, write {', '.join(self._converted(lr, name))}; or go on in its units with "
            'adjust_lr_fn="match_rms_adamw" and an adamw_lr. If AdamW would train at it, say so with adjust_lr_fn="adamw"'
        )

    def _converted(self, lr: float, name: str) -> list[str]:
        """The settings that make of an earlier version's the same training."""
        own = name == "lr"  # else a param group's or a schedule's
        written = [f"lr={lr / 5:.3g}" if own else f"{lr / 5:.3g} there"]
        if self.adamw_lr is None:
            written.append(f"adamw_lr={lr / 10:.3g}" if own else "half of the optimizer's lr as adamw_lr")
        if self.weight_decay:
            written.append(f"weight_decay={self.weight_decay * 5:.3g}")
            if self.adamw_weight_decay is None:
                written.append(f"adamw_weight_decay={self.weight_decay:.3g}")
        return written
