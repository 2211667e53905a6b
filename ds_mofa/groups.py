"""What a param group may say, checked as options are: when it is handed over, and its rates before each step."""

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ds_mofa.options import OptimizerOptions, OptionError, check_number

__all__ = ["check_group", "check_rates", "check_units"]

_RATES = ("lr", "initial_lr", "max_lr")  # a step's, and where a schedule says that it starts and ends
_TAKEN = ("params", "lr", "weight_decay", "betas", "eps")
# What torch's optimizers and schedulers, and DeepSpeed, write into groups that may have been another optimizer's.
_FOUND_THERE = frozenset(
    {"amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}
    | {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"}
    | {"name", "param_names", "moe", "use_muon", "bias_correction", "step"}
)
# Of those, what would be another training.
_REFUSED = {
    "maximize": (True, "the loss is minimised: negate it"),
    "decoupled_weight_decay": (False, "the decay is decoupled, as AdamW's: set weight_decay with that in mind"),
    "use_muon": (True, "the matrices have an optimizer already"),
    "bias_correction": (False, "AdamW's moments are debiased"),
}


def check_group(group: Mapping[str, Any], number: int, options: OptimizerOptions) -> None:
    """Refuse a group that a user has handed over where something in it cannot be right, or would do nothing.

    ``lr`` and ``weight_decay`` are numbers >= 0; ``betas`` (two, >= 0 and < 1) and ``eps`` (> 0) count for AdamW's part
    of the group. What other optimizers, schedulers and DeepSpeed write into groups may be there, and labels: strings
    and lists of strings under any name that is no option's.

    Args:
        group: with its parameters under ``"params"``.
        number: its place among the groups, for the message.
        options: of the optimizer.

    Raises:
        OptionError: it names the group, the key and what it takes.
    """
    where = _place(group, number)
    if "params" not in group:
        raise OptionError(f'{where} has no "params": it takes its parameters under that key')
    _check_numbers(group, where)
    check_units(group, options, f"{where}: ")
    if "betas" in group:
        betas = group["betas"]
        if isinstance(betas, str) or not isinstance(betas, Sequence) or len(betas) != 2:
            raise OptionError(f"{where}: betas={betas!r} must be two numbers, such as [0.9, 0.999]")
        for beta in betas:
            check_number(f"{where}: betas", _plain(beta), low=0, high=1)
    if "eps" in group:
        check_number(f"{where}: eps", _plain(group["eps"]), low=0, open_low=True)
    for key, (value, why) in _REFUSED.items():
        if group.get(key) is value:
            raise OptionError(f"{where}: {key}={value!r} is not what {options.title} does ({why}). Leave it out")
    names = {*options.names(), *options.aliases}
    for key, value in group.items():
        if key not in _TAKEN and key not in _FOUND_THERE:
            _refuse_unknown(key, value, where, names, options)


def check_units(group: Mapping[str, Any], options: OptimizerOptions, where: str) -> None:
    """Refuse a group that carries a rate which can only be meant in other units than ``lr`` has.

    Its ``lr``, and what a schedule keeps beside it: where it starts (``initial_lr``) and how far it goes (``max_lr``).

    Args:
        group: a param group, or the settings of one from a checkpoint.
        options: of the optimizer.
        where: whose the rate is, the beginning of the message.

    Raises:
        OptionError: it says what to write.
    """
    for key in _RATES:
        rate = _plain(group.get(key, 0.0))
        if isinstance(rate, float | int):
            options.check_rate(rate, f"{where}{key}")


def check_rates(groups: Sequence[Mapping[str, Any]], options: OptimizerOptions) -> None:
    """Refuse to step where a schedule has made an ``lr`` or ``weight_decay`` negative, NaN or infinite, or a rate one of other
    units (:func:`check_units`): here, whatever raises it, and however late.

    Raises:
        OptionError: it names the group.
    """
    for number, group in enumerate(groups):
        for key in ("lr", "weight_decay"):
            value = group.get(key, 0.0)
            if type(value) is float and 0.0 <= value < math.inf:
                continue
            _check_numbers({key: value}, f"before this step, {_place(group, number)}")
        check_units(group, options, f"before this step, {_place(group, number)}: ")


def _refuse_unknown(key: str, value: Any, where: str, names: set[str], options: OptimizerOptions) -> None:
    title = options.title
    if key == "lr_scale":
        raise OptionError(f"{where}: lr_scale is how {title} keeps AdamW's rate: write the group's own \"lr\", scaled")
    if key in names:
        raise OptionError(f"{where}: {key!r} is an option of the whole optimizer: give it to {title}, not to a group")
    close = difflib.get_close_matches(str(key), [*_TAKEN, *sorted(names)], n=1, cutoff=0.75)
    if not close and _is_label(value):
        return
    raise OptionError(
        f"{where} has an unknown key {key!r}"
        + (f"; did you mean {close[0]!r}?" if close else ".")
        + f" A group takes {', '.join(_TAKEN)}, the last two for AdamW's part of it, and labels such as name"
    )


def _check_numbers(group: Mapping[str, Any], where: str) -> None:
    for key in ("lr", "weight_decay"):
        if key in group:
            check_number(f"{where}: {key}", _plain(group[key]), low=0)


def _plain(value: Any) -> Any:
    """The number in a tensor of one element, or in a scalar of NumPy's; else the value."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool | int) else value


def _is_label(value: Any) -> bool:
    return isinstance(value, str) or isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _place(group: Mapping[str, Any], number: int) -> str:
    name = group.get("name")
    return f"param group {number}" + (f" ({name!r})" if isinstance(name, str) else "")
