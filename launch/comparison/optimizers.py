"""Optimizers by name, each made ready for a model: the one thing that a comparison varies."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ds_mofa
from ds_mofa.parameters import split_parameters
from launch.comparison.reading import unknown
from launch.errors import UserError

__all__ = ["OPTIMIZERS", "build", "clip_gradients", "state_bytes"]

Built = tuple[nn.Module, list[torch.optim.Optimizer]]


def build(name: str, model: nn.Module, options: Mapping[str, Any], head_modules: Sequence[str]) -> Built:
    """Make an optimizer.

    Args:
        name: one of ``OPTIMIZERS``.
        options: its arguments, as the YAML gives them.
        head_modules: names of modules without pre-trained weights; see :class:`launch.comparison.tasks.Task`.

    Returns:
        The model to train (LoRA wraps it), and the optimizers that step together.

    Raises:
        UserError: no such optimizer, or an option that it does not take.
    """
    if name not in OPTIMIZERS:
        raise UserError(unknown(name, OPTIMIZERS, "optimizers: there is no optimizer"))
    try:
        return OPTIMIZERS[name](model, head_modules, **options)
    except (TypeError, ValueError) as error:
        shown = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise UserError(f"optimizers: {name} cannot be built with {shown} ({error}). Correct its options.") from error


def clip_gradients(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], max_norm: float) -> None:
    """Scale the gradients down to a global norm of at most ``max_norm``, by the optimizer's own method if it has one:
    MoFaSGD's matrices have no ``.grad``.
    """
    own = getattr(optimizers[0], "clip_grad_norm_", None)
    if own is not None:
        own(max_norm)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def state_bytes(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Bytes of all tensors that the optimizers keep between steps."""
    found: dict[int, int] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for part in value.values():
                collect(part)
        elif isinstance(value, list | tuple):
            for part in value:
                collect(part)

    states = [optimizer.state_dict() for optimizer in optimizers]  # kept, so that no address is used twice
    collect(states)
    return sum(found.values())


def _adamw(model: nn.Module, head_modules: Sequence[str], **options: Any) -> Built:
    trained = [param for param in model.parameters() if param.requires_grad]
    return model, [torch.optim.AdamW(trained, **{"weight_decay": 0.0, **options})]


def _muon(model: nn.Module, head_modules: Sequence[str], *, lr: float, adamw_lr: float, **options: Any) -> Built:
    """``torch.optim.Muon`` on what MoFaSGD takes for a matrix, AdamW on the rest."""
    split = split_parameters(model, model.parameters(), ds_mofa.Options(rank=1))
    matrices = [matrix.param for matrix in split.matrices]
    rest = [param for group in split.adamw_groups for param in group["params"]]
    options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw", **options}
    return model, [torch.optim.Muon(matrices, lr=lr, **options), *_adamw(nn.ParameterList(rest), (), lr=adamw_lr)[1]]


def _mofasgd(model: nn.Module, head_modules: Sequence[str], **options: Any) -> Built:
    return model, [ds_mofa.MoFaSGD(model, **options)]


def _lora(
    model: nn.Module,
    head_modules: Sequence[str],
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> Built:
    """AdamW on low-rank adapters of all linears (alpha: 2 * rank by default), and on the new head in full."""
    if importlib.util.find_spec("peft") is None:
        raise UserError('optimizers: LoRA needs peft. Install it with: pip install -e ".[compare]"')
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=list(head_modules) or None,
        modules_to_save=list(head_modules) or None,
    )
    return _adamw(get_peft_model(model, config), (), **options)


OPTIMIZERS: dict[str, Callable[..., Built]] = {"AdamW": _adamw, "Muon": _muon, "MoFaSGD": _mofasgd, "LoRA": _lora}
