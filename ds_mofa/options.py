"""What a user may set, in Python or in the ``"params"`` of a DeepSpeed JSON, checked before anything is built."""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args, get_type_hints

__all__ = ["Options", "OptionError", "check_number", "check_integer"]

AdjustLr = Literal["match_rms_adamw", "original", "none"]
UpdateRule = Literal["spectral", "inverse_sigma"]
Rounding = Literal["stochastic", "nearest"]
CaptureMode = Literal["linear", "hook"]
AdamWReduce = Literal["step", "micro_batch"]
AdamWStates = Literal["full", "8bit"]

# A config whose "type" was AdamW a minute ago has these.
_ALIASES = {"betas": "adamw_betas", "eps": "adamw_eps"}

_LARGEST = 10**300


class OptionError(ValueError):
    """An option that cannot be right; the message names it, its value, and what would be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of MoFaSGD.

    Matrix parameters (2-D weights that are not embeddings or output heads):

    Attributes:
        lr: learning rate of the matrices, per step, > 0. A rank-r update has about sqrt(r / min(m, n)) of
            the size of AdamW's at the same number, so it wants to be larger than AdamW's: 3e-3 to 1.2e-2.
        rank: r, the number of momentum directions kept per matrix, >= 1. State is r (m + n + 1) fp32 numbers.
        beta: decay of the momentum per step, 0 <= beta < 1 (the average weighs the gradient by 1 - beta).
        weight_decay: decoupled; each step multiplies the weights by 1 - lr * weight_decay.
        adjust_lr_fn: factor on lr by shape, in the sense of ``torch.optim.Muon``: ``"match_rms_adamw"``
            0.2 sqrt(max(m, n)), ``"original"`` sqrt(max(1, m / n)), ``"none"`` 1. m outputs and n inputs are the linear
            map's, also where a module keeps its weight transposed (transformers' Conv1D).
        update_rule: ``"spectral"``, W -= lr U V^T (the paper's equation), or ``"inverse_sigma"``,
            W -= lr U diag(1 / sigma) V^T with 1 / sigma at most ``inverse_sigma_clamp`` (what the paper's
            code runs).
        inverse_sigma_clamp: see ``update_rule``; > 0. With fp16 matrices at most 65504, with ``balance`` 6550.
        balance: p, 0 to 1. Each matrix's update is multiplied by (b / |sigma|)^p, b the geometric mean of all matrices'
            |sigma|: one whose gradients are small moves further, as it does under AdamW. At most by 10, at least by
            1 / 10. Costs an all-reduce of two numbers a step; 0 (the paper's rule) does without.
        explore: k, 0 or more. The momentum's r directions are joined by 2 k that it has not, new in each step: with
            random E (n x k) and F (m x k) the update is U V^T + s (A E^T + F B^T), A and B the polar factors of
            (1 - U U^T) G (1 - V V^T) E and of the same of G^T and F (:mod:`ds_mofa.exploring`). Sketches, working copies
            and the two collectives have r + k columns, the write to the weights r + 2 k; no state, and a checkpoint of
            a run with another k is taken as it is. Of an m x n matrix at most min(m, n) - r of the k have an effect.
            With ``update_rule`` "spectral" alone. 0 (the paper's rule) costs nothing.
        explore_scale: s = ``explore_scale`` sqrt(min(m, n) / k), > 0: at 1, A E^T and F B^T are each as long as the
            update of a momentum of full rank would be. ``balance`` multiplies all of the update alike. With fp16
            matrices s, times 10 with ``balance``, is at most 65504.
        rounding: how an update is written into 16-bit weights: ``"stochastic"`` (right in the mean, however
            small the update) or ``"nearest"``. Without effect on fp32 weights.
        master_weights: keep an fp32 master of each 16-bit matrix, 4 more bytes a weight (a shard of it under
            ZeRO stage 3, a whole one on every rank else; in host memory with ``offload_optimizer``).
        capture: how the sketches are taken: ``"linear"`` (``nn.Linear`` never computes its weight gradient;
            anything else falls under ``"hook"``) or ``"hook"`` (the gradient of one parameter at a time is
            sketched as soon as it is there, and dropped).
        include: regular expressions, searched in parameter names: 2-D parameters to make matrices although
            they are embeddings or output heads.
        exclude: likewise: parameters to leave to AdamW. Wins over ``include``.
        fused_head: compute the loss of a Hugging Face causal language model in its output head, by chunks of tokens
            (:mod:`ds_mofa.capture.head`): in training no tensor holds all logits, and the output's ``logits`` are None. A head
            that ``include`` makes a matrix has no weight gradient either, only sketches.
        update_bytes: most bytes of temporaries of the factor update, on each rank, > 0: it works on so many matrices at
            a time, one at least. With the default all 224 matrices of LLaMA-8B at rank 32 are one batch on one GPU.
            Half of it takes half the memory and twice the kernel launches, and may round otherwise.
        seed: of the start's test matrices and of the stochastic rounding, 0 <= seed < 2^31.
        diagnostics_every: optimizer steps between two reports on every matrix (:mod:`ds_mofa.diagnostics`), to
            DeepSpeed's monitor and ``optimizer.matrices.report``; 0 for none.

    Everything else that is trained, by AdamW:

    Attributes:
        adamw_lr: learning rate; None: lr / 10. What is left to AdamW of a param group with an ``lr`` of its own steps
            at adamw_lr * (the group's lr / lr): layer-wise rates scale both alike.
        adamw_betas: decay rates of the two moments.
        adamw_eps: added to the denominator.
        adamw_weight_decay: decoupled; None: the same as ``weight_decay``. Parameter groups that set
            ``weight_decay: 0`` themselves keep 0.
        adamw_reduce: how often ZeRO stage 2 sends the gradients of this part. Once a ``"step"``: until then every rank
            holds them whole, 2 bytes a parameter in bf16. After each ``"micro_batch"``, as DeepSpeed does it for
            AdamW: a rank holds those that its partition has a piece of, which is all of the large ones, each in a
            partition of its own; it is for models of which much is left to AdamW. Stages 0 and 1 always do the first.
            Stage 3 always does the second, and so does stage 2 where gradients add up on the host
            (``offload_optimizer``), in another dtype than the weights', or without DeepSpeed counting micro-batches.
        adamw_states: how the two moments are kept. ``"full"``: in the dtype that the parameter is stepped in, 8 bytes a
            parameter with fp32 masters, 4 in bf16. ``"8bit"``: in blocks of 256 8-bit codes and a scale, 2.03 bytes
            (:mod:`ds_mofa.adamw_8bit`; needs torchao). bf16 parameters without an fp32 master, which ``"full"`` rounds to
            nearest, are then written by ``rounding``. Tensors below 4096 elements, of a partition under ZeRO, keep 32
            bits; a line in the log says how many. Does not go with ``offload_optimizer`` and universal checkpoints, and
            takes the place of DeepSpeed's choice of AdamWs (``torch_adam``, ``fused``, ``foreach``).

    Raises:
        OptionError: a value out of its range or of the wrong type, or an unknown name.
    """

    title: ClassVar[str] = "MoFaSGD"
    aliases: ClassVar[Mapping[str, str]] = _ALIASES
    foreign: ClassVar[frozenset[str]] = frozenset()  # fields that another optimizer's options have no use for

    lr: float = 6e-3
    rank: int = 8
    beta: float = 0.85
    weight_decay: float = 0.0
    adjust_lr_fn: AdjustLr = "match_rms_adamw"
    update_rule: UpdateRule = "spectral"
    inverse_sigma_clamp: float = 1e4
    balance: float = 0.0
    explore: int = 0
    explore_scale: float = 1.0
    rounding: Rounding = "stochastic"
    master_weights: bool = False
    capture: CaptureMode = "linear"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    fused_head: bool = False
    update_bytes: float = 2e9
    seed: int = 0
    diagnostics_every: int = 0
    adamw_lr: float | None = None
    adamw_betas: Sequence[float] = (0.9, 0.999)
    adamw_eps: float = 1e-8
    adamw_weight_decay: float | None = None
    adamw_reduce: AdamWReduce = "step"
    adamw_states: AdamWStates = "full"

    def __post_init__(self):
        check_number("lr", self.lr, low=0, open_low=True)
        check_number("beta", self.beta, low=0, high=1)
        check_number("weight_decay", self.weight_decay, low=0)
        check_number("update_bytes", self.update_bytes, low=0, open_low=True)
        check_number("inverse_sigma_clamp", self.inverse_sigma_clamp, low=0, open_low=True)
        check_number("balance", self.balance, low=0)
        if self.balance > 1:
            raise OptionError(f"balance={self.balance!r} must be a number from 0 to 1")
        check_number("explore_scale", self.explore_scale, low=0, open_low=True)
        check_number("adamw_eps", self.adamw_eps, low=0, open_low=True)
        for name in ("adamw_lr", "adamw_weight_decay"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0)
        for name in ("rank", "explore", "seed", "diagnostics_every"):
            check_integer(name, getattr(self, name), low=1 if name == "rank" else 0, high=2**31)
        for name in ("master_weights", "fused_head"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} must be true or false")
        for name, hint in get_type_hints(Options).items():
            choices = get_args(hint)
            if choices and all(isinstance(choice, str) for choice in choices) and getattr(self, name) not in choices:
                raise OptionError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, choices))}")
        if self.explore and self.update_rule != "spectral":
            raise OptionError(
                f"explore={self.explore} with update_rule={self.update_rule!r}: what is explored has no momentum, "
                'and so no sigma to divide by. Set update_rule to "spectral", or explore to 0'
            )
        if not _is_list(self.adamw_betas) or len(self.adamw_betas) != 2:
            raise OptionError(f"adamw_betas={self.adamw_betas!r} must be two numbers, such as [0.9, 0.999]")
        for beta in self.adamw_betas:
            check_number("adamw_betas", beta, low=0, high=1)
        for name in ("include", "exclude"):
            self._patterns(name, getattr(self, name))

    @classmethod
    def from_config(cls, params: Mapping[str, Any], passed_on: Sequence[str] = ()) -> "tuple[Options, dict[str, Any]]":
        """Options from a JSON object, and those of its entries that are named in ``passed_on``, untouched.

        Raises:
            OptionError: an unknown name, a value that cannot be right, or no object at all.
        """
        if not isinstance(params, Mapping):
            raise OptionError(f'params={params!r} must be an object of options, such as {{"lr": 6e-3, "rank": 8}}')
        rest = {key: params[key] for key in passed_on if key in params}
        own = {}
        known = [field.name for field in dataclasses.fields(cls) if field.name not in cls.foreign]
        for key, value in params.items():
            if key in rest:
                continue
            name = cls.aliases.get(key, key)
            if name not in known:
                raise OptionError(_unknown(key, [*known, *cls.aliases, *passed_on], cls.title))
            if name in own:
                raise OptionError(f"{key!r} and {name!r} are the same option of {cls.title}: give one of them")
            if value == "auto":
                raise OptionError(
                    f'{key}="auto" was not filled in: only Hugging Face\'s Trainer fills in "auto", and only for lr, '
                    "betas, eps and weight_decay. Write a value"
                )
            own[name] = value
        return cls(**own), rest

    @property
    def gamma(self) -> float:
        """Weight of the gradient in the momentum's average."""
        return 1.0 - self.beta

    @property
    def adamw_lr_ratio(self) -> float:
        """AdamW's learning rate over the matrices': a schedule moves both, this stays."""
        return 0.1 if self.adamw_lr is None else self.adamw_lr / self.lr

    def shape_factor(self, m: int, n: int) -> float:
        """The factor on lr for a linear map of n inputs and m outputs, see ``adjust_lr_fn``."""
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(m, n))
        if self.adjust_lr_fn == "original":
            return math.sqrt(max(1.0, m / n))
        return 1.0

    def explore_length(self, m: int, n: int) -> float:
        """s for an m x n matrix, see ``explore_scale``."""
        return self.explore_scale * math.sqrt(min(m, n) / max(1, self.explore))

    @staticmethod
    def _patterns(name: str, patterns: Any) -> None:
        if not _is_list(patterns) or not all(isinstance(pattern, str) for pattern in patterns):
            raise OptionError(f'{name}={patterns!r} must be a list of regular expressions, such as ["lm_head"]')
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:  # the last two: counts and nesting without end
                raise OptionError(f"{name}: {pattern!r} is not a regular expression ({error})") from None


def check_number(name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """Raise an OptionError unless low <= value < high, or low < value < high."""
    bounds = f"{'>' if open_low else '>='} {low}" + (f" and < {high}" if high < math.inf else "")
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise OptionError(f"{name}={value!r} must be a number {bounds}")
    if isinstance(value, int) and abs(value) > _LARGEST:  # JSON has integers of any size, arithmetic has not
        raise OptionError(f"{name} has {len(str(abs(value)))} digits and must be a number {bounds}")
    if not (low < value if open_low else low <= value) or not value < high:
        raise OptionError(f"{name}={value!r} must be {bounds}")


def check_integer(name: str, value: Any, *, low: int, high: int) -> None:
    """Raise an OptionError unless value is an int, low <= value < high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
        raise OptionError(f"{name}={value!r} must be a whole number >= {low} and < {high}")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _unknown(key: str, known: list[str], title: str) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return (
        f"unknown option {key!r} of {title}"
        + (f"; did you mean {close[0]!r}?" if close else "")
        + f" The options are {', '.join(sorted(known))}"
    )
