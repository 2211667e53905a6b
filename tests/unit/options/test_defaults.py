"""A script's ``torch.set_default_device`` and ``set_default_dtype`` are for its model: here they change no bit."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from ds_mofa import GaLore, MoFaSGD
from ds_mofa.adamw.eight_bit import _torchao
from ds_mofa.linalg.orthonormal import _generic_columns

KINDS = {
    "plain": (MoFaSGD, {}),
    "all of it": (MoFaSGD, {"balance": 0.5, "explore": 3, "diagnostics_every": 1, "master_weights": True}),
    "inverse sigma": (
        MoFaSGD,
        {"update_rule": "inverse_sigma", "adjust_lr_fn": "none", "adamw_lr": 1e-3, "capture": "hook"},
    ),
    "GaLore": (GaLore, {"refresh_every": 2}),
}


@contextlib.contextmanager
def device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def dtype(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "meta": lambda: device("meta"),  # as "cuda" where the model is elsewhere: a tensor made there is no use here
    "float64": lambda: dtype(torch.float64),
    "bfloat16": lambda: dtype(torch.bfloat16),
}


def trained(kind, where, kept, states):
    """Four steps, a state loaded, at another rank where there is one, and two more."""
    optimizer, options = KINDS[kind]
    torch.manual_seed(0)
    layers = [nn.Linear(70, 96, bias=False), nn.Linear(96, 24, bias=states is not None)]
    model = nn.Sequential(*layers, *([nn.Linear(24, 200)] if states else [])).to(kept)
    other, x = copy.deepcopy(model), torch.randn(30, 70).to(kept)
    for cached in (_torchao, _generic_columns):
        cached.cache_clear()
    settings = {"rank": 4, "lr": 2e-3, **options}
    if states:
        settings |= {"adamw_states": states, "exclude": ["2.weight"]}
    with where():
        first = optimizer(model, **settings)
        run(model, first, x, 4)
        if optimizer is MoFaSGD:
            settings["rank"] = 6
        other.load_state_dict(model.state_dict())
        second = optimizer(other, **settings)
        second.load_state_dict(first.state_dict())
        run(other, second, x, 2)
    return {name: param.detach() for name, param in other.named_parameters()}


def run(model, optimizer, x, steps):
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("states", [None, "8bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_default_of_the_script_changes_no_bit(kind, states, kept, default):
    wanted = trained(kind, contextlib.nullcontext, kept, states)
    found = trained(kind, DEFAULTS[default], kept, states)
    for name, value in wanted.items():
        assert found[name].dtype == kept and torch.equal(found[name], value), name
