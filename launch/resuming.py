"""What is in force after a resume: a checkpoint brings its own learning rates, weight decays, betas and eps.

DeepSpeed restores the optimizer's param groups and the scheduler's base rates over those that the command line and the
JSON have just made. All else (schedule, number of steps, rank, beta, explore, balance, ...) is not in the state, and is
what the command says. Both are read off the engine here, before and after the load, so that nothing is in force unsaid.
"""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OVERRIDE = "--override_checkpoint"

_KEPT = ("weight_decay", "betas", "eps", "lr_scale")  # what a param group holds beside its learning rate

Group = dict[str, Any]


def settings(optimizer: Optimizer, scheduler: Any) -> list[Group]:
    """Of every param group what it is trained with: ``lr`` as the schedule starts from it, and _KEPT."""
    groups = optimizer.param_groups
    rates = _base_rates(scheduler) or [group["lr"] for group in groups]
    return [
        {"lr": rate, **{key: group[key] for key in _KEPT if key in group}}
        for rate, group in zip(rates, groups, strict=True)
    ]


def enforce(optimizer: Optimizer, scheduler: Any, asked: Sequence[Group]) -> None:
    """Put what :func:`settings` has given before a load in force after it; the schedule goes on where it was."""
    loaded = settings(optimizer, scheduler)
    for group, ours, theirs in zip(optimizer.param_groups, asked, loaded, strict=True):
        group.update({key: value for key, value in ours.items() if key != "lr"})
        group["lr"] = group["lr"] * ours["lr"] / theirs["lr"] if theirs["lr"] else ours["lr"]
        if "initial_lr" in group:
            group["initial_lr"] = ours["lr"]
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [ours["lr"] for ours in asked]
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def reschedule(scheduler: Any) -> None:
    """Have the command's schedule set its rates at once.

    A load has left the checkpoint's for a step: of DeepSpeed's schedules another peak, of Hugging Face's another number
    of steps, so that a finished run that is to go on would take its first step at a rate of 0.
    """
    if getattr(scheduler, "last_batch_iteration", -1) >= 0:
        scheduler.step(scheduler.last_batch_iteration)
    elif isinstance(scheduler, LambdaLR):
        rates = [base * share(scheduler.last_epoch) for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def in_force(optimizer: Optimizer, scheduler: Any) -> str:
    """The learning rates that the schedule scales, as param_groups have them, and what they are now, where it is less."""
    rates = {name: values for name, values in named(settings(optimizer, scheduler)).items() if name.endswith("lr")}
    now = named(optimizer.param_groups)
    return ", ".join(
        f"{name} {_text(values)}" + (f" (now {_text(now[name])})" if now[name] != values else "")
        for name, values in rates.items()
    )


def differences(asked: Sequence[Group], in_force: Sequence[Group]) -> list[str]:
    """A line for each setting of which the checkpoint's value is in force, and not the command's."""
    ours, theirs = named(asked), named(in_force)
    return [
        f"resumed: {name} {_text(theirs[name])} of the checkpoint is in force, not {_text(ours[name])} of the command "
        f"line or the JSON; to change it, add {OVERRIDE}"
        for name in ours
        if ours[name] != theirs[name]
    ]


def named(groups: Sequence[Group]) -> dict[str, list]:
    """Each setting's distinct values by the name that an option gives it: MoFaSGD's AdamW has an ``adamw_`` before."""
    found: dict[str, list] = {}
    for group in groups:
        prefix = "adamw_" if "lr_scale" in group else ""
        values = {key: group[key] for key in ("lr", *_KEPT) if key in group}
        values["lr"] *= values.pop("lr_scale", 1.0)
        for key, value in values.items():
            value = [float(f"{number:.12g}") for number in (value if isinstance(value, Sequence) else [value])]
            kept = found.setdefault(prefix + key, [])
            if value not in kept:
                kept.append(value)
    return found


def _base_rates(scheduler: Any) -> Sequence[float] | None:
    """The rates that a schedule scales: PyTorch's are in its state, DeepSpeed's own (the others) are not."""
    for name in ("base_lrs", "max_lrs", "org_lrs"):
        rates = getattr(scheduler, name, None)
        if rates is not None:
            return rates
    return None


def _text(values: list[list[float]]) -> str:
    return " and ".join(", ".join(f"{number:g}" for number in value) for value in values)
