"""A state that is none of this optimizer's is named, and nothing changes: torch's own, one that lacks a part, a NaN."""

import copy

import pytest
import torch
from torch import nn

from ds_mofa import MoFaSGD


def trained(steps: int = 2) -> tuple[nn.Module, MoFaSGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.LayerNorm(16))
    optimizer = MoFaSGD(model, lr=2e-3, rank=4)
    for _ in range(steps):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def of_adamw(state: dict) -> dict:
    model = nn.Linear(16, 24)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    return optimizer.state_dict()


def lacks_v(state: dict) -> dict:
    del state["mofasgd"]["matrices"]["0.weight"]["V"]
    return state


def has_nan(state: dict) -> dict:
    state["mofasgd"]["matrices"]["2.weight"]["sigma"][0] = float("nan")
    return state


def other_adamw(state: dict) -> dict:
    state["adamw"]["param_groups"] = []
    return state


def half(state: dict) -> dict:
    one = state["mofasgd"]["matrices"]["0.weight"]
    one["U"] = one["U"].half()
    return state


@pytest.mark.parametrize(
    "spoil, message",
    [
        (of_adamw, "no state of MoFaSGD but of AdamW or another optimizer of torch.optim"),
        (lambda state: {}, "no state of MoFaSGD"),
        (lacks_v, "no tensor V of '0.weight'"),
        (has_nan, "sigma of '2.weight' holds a NaN"),
        (half, "U of '0.weight' is of torch.float16"),
        (other_adamw, r"AdamW's param groups in the checkpoint have \[\] parameters"),
    ],
)
def test_it_is_refused_and_nothing_changes(spoil, message):
    state = spoil(copy.deepcopy(trained()[1].named_state_dict()))
    _, optimizer = trained(steps=1)
    before = copy.deepcopy(optimizer.named_state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.named_state_dict()
    assert optimizer.matrices.steps == 1
    for name, one in before["mofasgd"]["matrices"].items():
        assert all(torch.equal(value, after["mofasgd"]["matrices"][name][key]) for key, value in one.items())
    for index, one in before["adamw"]["state"].items():
        assert all(torch.equal(value, after["adamw"]["state"][index][key]) for key, value in one.items())
