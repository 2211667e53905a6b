"""Optimizers by name, each made ready for a model: the one thing that a comparison varies."""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ds_mofa.optimizers.base import MatrixOptimizer
from experiments import baselines
from experiments.baselines import comera
from experiments.comparison.masters import keep_masters
from experiments.comparison.reading import unknown
from launch.errors import UserError

__all__ = ["build", "clip_gradients", "names"]


def names() -> list[str]:
    """What :func:`build` can build."""
    return [*baselines.names(), "LoRA", "CoMERA"]


def build(
    name: str, model: nn.Module, options: Mapping[str, Any], head_modules: Sequence[str] = (), *, clips: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make an optimizer.

    Args:
        name: one of :func:`names`.
        options: its arguments, as the YAML gives them; and ``fp32_masters``: whether what is trained by AdamW, or by a
            baseline, has fp32 masters where it is of 16 bits. MoFaSGD's matrices have a ``master_weights`` of their own.
        head_modules: names of modules without pre-trained weights; see :class:`experiments.comparison.tasks.Task`.
        clips: whether :func:`clip_gradients` will be called.

    Returns:
        The model to train, which LoRA wraps and CoMERA changes, and its optimizer.

    Raises:
        UserError: no such optimizer, an option that it does not take, or gradients that cannot be clipped.
    """
    if name not in names():
        raise UserError(unknown(name, names(), "optimizers: there is no optimizer"))
    if clips and options.get("sketched"):
        raise UserError(
            f"optimizers: {name} with sketched=True leaves no gradients to clip. Set training.max_grad_norm to null, "
            "or sketched to false."
        )
    own = {option: value for option, value in options.items() if option != "fp32_masters"}
    masters = options.get("fp32_masters", False)
    if not isinstance(masters, bool):
        raise UserError(f"optimizers: {name} with fp32_masters={masters!r}: it must be true or false.")
    if masters and options.get("sketched"):
        raise UserError(
            f"optimizers: {name} with sketched=True leaves no gradients for fp32_masters. Leave one of them out."
        )
    if masters and name == "CoMERA":
        raise UserError(
            "optimizers: CoMERA has no fp32_masters: pruning changes the shapes that it trains. Leave it out."
        )
    try:
        if name == "LoRA":
            model, optimizer = _lora(model, head_modules, **own)
        elif name == "CoMERA":
            optimizer = _comera(model, **own)
        else:
            optimizer = baselines.build(name, model, **own)
    except (TypeError, ValueError) as error:
        shown = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise UserError(f"optimizers: {name} cannot be built with {shown} ({error}). Correct its options.") from error
    for part in _by_gradients(optimizer) if masters else ():
        keep_masters(part)
    return model, optimizer


def _by_gradients(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Of what it is made of, what steps parameters by their ``.grad``."""
    if isinstance(optimizer, MatrixOptimizer):
        return [optimizer.adamw] if optimizer.adamw is not None else []
    return optimizer.parts


def clip_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale the gradients down to a global norm of at most ``max_norm``, by the optimizer's own method if it has one:
    MoFaSGD's matrices have no ``.grad``.
    """
    own = getattr(optimizer, "clip_grad_norm_", None)
    if own is not None:
        own(max_norm)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def _lora(
    model: nn.Module,
    head_modules: Sequence[str],
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """AdamW on low-rank adapters of all linears (``alpha``: 2 * rank by default), and on a new head in full."""
    if importlib.util.find_spec("peft") is None:
        raise UserError('optimizers: LoRA needs peft. Install it with: pip install -e ".[compare]"')
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        modules_to_save=list(head_modules) or None,
    )
    adapted = get_peft_model(model, config)
    return adapted, baselines.build(
        "AdamW", adapted, rank=1, **options
    )  # the rank is the adapters', and AdamW has none


def _comera(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Trains in the place of the linears and the embedding; a kept model is dense again."""
    optimizer = comera.build(model, **options)
    optimizer.attach(model)
    model.merge_and_unload = functools.partial(comera.densify, model)
    return optimizer
