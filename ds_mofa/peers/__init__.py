"""The optimizers that MoFaSGD is compared with, in one process, on exactly the tensors that MoFaSGD would train.

>>> optimizer = ds_mofa.peers.build("GaLore", model, lr=1e-2, rank=8, refresh_every=100)

Each method is a file here, whose docstring has its equations, its source and its memory; docs/peers.md compares them.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ds_mofa.optimizer import MoFaSGD
from ds_mofa.options import Options
from ds_mofa.parameters import split_parameters
from ds_mofa.peers.fira import Fira
from ds_mofa.peers.galore import GaLore
from ds_mofa.peers.gum import GUM
from ds_mofa.peers.mlorc import MLorc
from ds_mofa.peers.peer import Peer
from ds_mofa.peers.so import SO

__all__ = ["build", "state_bytes", "names", "settings_of"]


def _adamw(params, *, betas=(0.9, 0.999), eps=1e-8) -> torch.optim.AdamW:
    Options(adamw_betas=betas, adamw_eps=eps)
    on_gpu = params[0]["params"][0].device.type == "cuda"
    return torch.optim.AdamW(params, betas=tuple(betas), eps=eps, fused=True if on_gpu else None)


def _muon(params, *, momentum=0.95, nesterov=True, ns_steps=5, adjust_lr_fn="match_rms_adamw") -> torch.optim.Muon:
    return torch.optim.Muon(params, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn)


_METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": _adamw,
    "Muon": _muon,
    "GaLore": GaLore,
    "Fira": Fira,
    "MLorc": MLorc,
    "GUM": GUM,
    "SO": SO,
}
# Forgetting the state repeats the random numbers of the others' first steps, and GUM and SO restart by themselves.
_RESETTABLE = ("AdamW", "GaLore", "Fira")

_COMMON = (
    "lr",
    "rank",
    "weight_decay",
    "include",
    "exclude",
    "adamw_lr",
    "adamw_betas",
    "adamw_eps",
    "adamw_weight_decay",
    "seed",
)


def names() -> list[str]:
    """What :func:`build` can build."""
    return [*_METHODS, "MoFaSGD"]


def settings_of(name: str) -> list[str]:
    """The settings of a method that not all have."""
    own = [key for key in inspect.signature(_METHODS[name]).parameters if key not in ("params", *_COMMON)]
    return own + ["reset_every"] * (name in _RESETTABLE)


def build(name: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """An optimizer of all trained parameters of ``model``: the method for its matrices, AdamW for the rest.

    Args:
        name: one of :func:`names`.
        model: what to train.
        **settings: of the method (:func:`settings_of`), and of all, which mean what they mean for MoFaSGD
            (:class:`ds_mofa.options.Options`): ``lr``, to be given, as each method needs another; ``rank``, which
            decides which parameters are matrices even where a method has none; ``weight_decay``, ``include``,
            ``exclude``, ``seed``, ``adamw_betas``, ``adamw_eps``, ``adamw_weight_decay``; and ``adamw_lr``, by default
            the same as ``lr``. "MoFaSGD" takes its own options alone, and has its own defaults.

    Raises:
        ValueError: an unknown name or setting, or a value that cannot be right.
    """
    if name not in names():
        raise ValueError(f"there is no peer {name!r}. There are {', '.join(names())}")
    if name == "MoFaSGD":
        return MoFaSGD(model, **settings)
    own = settings_of(name)
    for key in settings:
        if key not in own and key not in _COMMON:
            raise ValueError(
                f"{name} has no setting {key!r}. Its own are {', '.join(own)}; every peer has {', '.join(_COMMON)}"
            )
    if "lr" not in settings:
        raise ValueError(f"{name} needs an lr: no rate suits all methods; docs/peers.md has the published ones")

    options = Options(**{key: value for key, value in settings.items() if key in _COMMON})
    split = split_parameters(model, model.parameters(), options)
    reset_every = settings.get("reset_every", 0)
    Options._integer("reset_every", reset_every, low=0, high=2**31)

    method = _METHODS[name]
    given = {"rank": options.rank, "seed": options.seed, **settings}
    matrices = method(
        split.matrix_groups,
        **{key: given[key] for key in inspect.signature(method).parameters if key in given},
    )
    rest_lr = options.lr if options.adamw_lr is None else options.adamw_lr
    groups = [{"lr": rest_lr, **_without(group, "lr", "lr_scale")} for group in split.adamw_groups]
    rest = _adamw(groups, betas=options.adamw_betas, eps=options.adamw_eps) if groups else None
    return Peer(matrices, rest, reset_every=reset_every)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that the optimizer keeps from step to step, besides weights and gradients.

    Of MoFaSGD these are factors, working copies, masters and AdamW's moments; its sketches stand in the gradients' place.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _kept(optimizer))


def _kept(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    if isinstance(optimizer, MoFaSGD):
        yield from (optimizer.matrices.factors, optimizer.matrices.working)
        yield from optimizer.matrices.master_state().values()
        optimizer = optimizer.adamw
    if optimizer is not None:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _without(group: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in keys}
