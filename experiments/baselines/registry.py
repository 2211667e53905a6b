"""The baselines by name, each built around the same split of a model's parameters, and ``ds_mofa``'s own optimizers.

Of two of one name it is the baseline: "GaLore" here sees whole gradients, ds_mofa's works from sketches.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_mofa.optimizers.registry import OPTIMIZERS
from ds_mofa.options import OptionError, Options, check_integer, check_number
from ds_mofa.parameters import split_parameters
from experiments.baselines.adam import check_adam
from experiments.baselines.baseline import Baseline
from experiments.baselines.fira import Fira
from experiments.baselines.galore import GaLore
from experiments.baselines.gum import GUM
from experiments.baselines.laboratory import MoFaSGDLab
from experiments.baselines.mlorc import MLorc
from experiments.baselines.so import SO

__all__ = ["build", "names"]


def _adamw(params, *, betas=(0.9, 0.999), eps=1e-8) -> torch.optim.AdamW:
    check_adam(betas, eps)
    on_gpu = params[0]["params"][0].device.type == "cuda"
    return torch.optim.AdamW(params, betas=tuple(betas), eps=eps, fused=True if on_gpu else None)


def _muon(params, *, momentum=0.95, nesterov=True, ns_steps=5, adjust_lr_fn="match_rms_adamw") -> torch.optim.Muon:
    check_number("momentum", momentum, low=0, high=1)
    check_integer("ns_steps", ns_steps, low=1, high=100)
    return torch.optim.Muon(params, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn)


_METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": _adamw,
    "Muon": _muon,
    "GaLore": GaLore,
    "Fira": Fira,
    "MLorc": MLorc,
    "GUM": GUM,
    "SO": SO,
    "MoFaSGD-lab": MoFaSGDLab,
}
# With the others a reset would repeat the random numbers of the first steps; GUM's momentum restarts by itself.
_RESETTABLE = ("AdamW", "GaLore", "Fira")
# Between two subspaces these are linear in G, through P^T G.
_SKETCHED = ("GaLore", "GUM")

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
    return [*_METHODS, *(name for name in OPTIMIZERS if name not in _METHODS)]


def build(name: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """An optimizer of all trained parameters of ``model``: the method for its matrices, AdamW for the rest.

    Args:
        name: one of :func:`names`.
        model: what to train.
        **settings: of the method, as in its file, and of all, which mean what they mean for MoFaSGD
            (:class:`ds_mofa.options.Options`): ``lr``, to be given, as each method needs another; ``rank``, which
            decides which parameters are matrices even where a method has none; ``weight_decay``, ``include``,
            ``exclude``, ``seed``, ``adamw_betas``, ``adamw_eps``, ``adamw_weight_decay``; and ``adamw_lr``, by default
            the same as ``lr``. ``reset_every`` (AdamW, GaLore, Fira) is :mod:`experiments.baselines.restarts`';
            ``sketched`` (GaLore, GUM) takes P^T G in backward instead of G where a step needs no more, and leaves
            matrices without ``.grad``, so that ``clip_grad_norm_`` does not see them. MoFaSGD, and what else
            ``ds_mofa`` has registered, takes its own options alone, and has its own defaults.

    Raises:
        ValueError: an unknown name or setting, or a value that cannot be right.
    """
    if name not in names():
        raise ValueError(f"there is no baseline {name!r}. There are {', '.join(names())}")
    if name not in _METHODS:
        return OPTIMIZERS[name].optimizer(model, **settings)
    own = _own_settings(name)
    for key in settings:
        if key not in own and key not in _COMMON:
            raise ValueError(
                f"{name} has no setting {key!r}. Its own are {', '.join(own)}; every baseline has {', '.join(_COMMON)}"
            )
    if "lr" not in settings:
        raise ValueError(f"{name} needs an lr: no rate suits all methods; docs/baselines.md has the published ones")

    # No baseline's lr is MoFaSGD's: any is taken.
    options = Options(adjust_lr_fn="adamw", **{key: value for key, value in settings.items() if key in _COMMON})
    split = split_parameters(model, model.parameters(), options)
    stacks = [matrix.name for matrix in split.matrices if matrix.stack is not None]
    if stacks and name != "AdamW":
        raise OptionError(f"{name} trains matrices, and {stacks[0]!r} is a stack of them: exclude it")
    reset_every, sketched = settings.get("reset_every", 0), settings.get("sketched", False)
    check_integer("reset_every", reset_every, low=0, high=2**31)
    if not isinstance(sketched, bool):
        raise OptionError(f"sketched={sketched!r} must be true or false")
    if sketched and dist.is_initialized() and dist.get_world_size() > 1:
        raise OptionError(
            "sketched=True is for one process: DDP does not see what is captured, and would not reduce it. Leave it out, or "
            "take ds_mofa.GaLore"
        )

    method = _METHODS[name]
    given = {"rank": options.rank, "seed": options.seed, **settings}
    matrices = method(
        split.matrix_groups,
        **{key: given[key] for key in inspect.signature(method).parameters if key in given},
    )
    if sketched:
        matrices.capture(split.matrices, options.capture)
    rest_lr = options.lr if options.adamw_lr is None else options.adamw_lr
    groups = [{"lr": rest_lr, **_without(group, "lr", "lr_scale")} for group in split.adamw_groups]
    rest = _adamw(groups, betas=options.adamw_betas, eps=options.adamw_eps) if groups else None
    return Baseline(matrices, rest, reset_every=reset_every)


def _own_settings(name: str) -> list[str]:
    """The settings of a method that not all have."""
    own = [key for key in inspect.signature(_METHODS[name]).parameters if key not in ("params", *_COMMON)]
    return own + ["reset_every"] * (name in _RESETTABLE) + ["sketched"] * (name in _SKETCHED)


def _without(group: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in keys}
