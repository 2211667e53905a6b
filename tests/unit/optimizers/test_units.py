"""The units of lr: those of earlier versions, converted; one rule for rates that are not AdamW's, wherever they come from."""

import re

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from ds_mofa import MoFaSGD, OptionError

EARLIER = {"lr": 6e-3, "adamw_lr": 6e-4, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
NOW = {"lr": 1.2e-3, "adamw_lr": 6e-4, "weight_decay": 0.5, "adamw_weight_decay": 0.1}
FAR = (
    r"lr=0\.00\d+ is far above AdamW's rates.*adjust_lr_fn=\"match_rms_adamw\" and an adamw_lr.*adjust_lr_fn=\"adamw\""
)


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).double()


def backward(model: nn.Module, seed: int) -> None:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model(x).square().mean().backward()


def step(model: nn.Module, optimizer: MoFaSGD, seed: int) -> None:
    backward(model, seed)
    optimizer.step()
    optimizer.zero_grad()


def trained(**options) -> dict[str, torch.Tensor]:
    model = model_of()
    optimizer = MoFaSGD(model, rank=3, explore=2, balance=0.5, **options)
    for seed in range(4):
        step(model, optimizer, seed)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_an_earlier_config_converted_trains_the_same():
    earlier, now = trained(**EARLIER), trained(**NOW)
    for name, weight in earlier.items():
        torch.testing.assert_close(now[name], weight, rtol=1e-9, atol=1e-11)
    for key in NOW:  # each of them counts
        other = trained(**{**NOW, key: 1.5 * NOW[key]})
        assert any((other[name] - weight).norm() > 1e-6 for name, weight in earlier.items()), key


def test_the_message_has_the_conversion():
    earlier = {key: EARLIER[key] for key in ("lr", "weight_decay")}
    with pytest.raises(OptionError, match=FAR) as refused:
        MoFaSGD(model_of(), rank=3, **earlier)
    written = re.search(r"write (.*?);", str(refused.value)).group(1)
    assert dict(part.split("=") for part in written.split(", ")) == {key: f"{value:g}" for key, value in NOW.items()}


# A schedule, and how many steps are taken before it is refused.
BEYOND = {
    "LambdaLR": (lambda o: LambdaLR(o, lambda step: 3.0 if step == 2 else 1.0), 2),
    "OneCycleLR": (lambda o: OneCycleLR(o, max_lr=5e-3, total_steps=9, cycle_momentum=False), 0),
    "CyclicLR": (lambda o: CyclicLR(o, 1e-3, 5e-3, step_size_up=2, cycle_momentum=False), 1),
}


@pytest.mark.parametrize("schedule", BEYOND)
def test_a_schedule_that_goes_beyond_is_refused_before_anything_moves(schedule):
    make, taken = BEYOND[schedule]
    model = model_of()
    optimizer = MoFaSGD(model, rank=3, lr=1e-3)
    scheduler = make(optimizer)
    for seed in range(taken):
        step(model, optimizer, seed)
        scheduler.step()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    backward(model, taken)
    with pytest.raises(OptionError, match=f"before this step, param group 0: (max_)?{FAR}"):
        optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    for group in optimizer.param_groups:  # whoever mends it goes on
        group.update({key: 1e-3 for key in ("lr", "max_lr") if key in group})
    optimizer.step()
    assert not any(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("schedule", BEYOND)
def test_it_trains_where_the_rate_is_said_to_be_meant(schedule):
    model = model_of()
    optimizer = MoFaSGD(model, rank=3, lr=1e-3, adjust_lr_fn="adamw")
    scheduler, seen = BEYOND[schedule][0](optimizer), []
    for seed in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        step(model, optimizer, seed)
        scheduler.step()
    assert max(seen) > 2e-3


@pytest.mark.parametrize("form", ["state_dict", "named_state_dict"])
def test_a_resumed_run_says_what_a_start_says(form):
    """Also where the schedule of the earlier run had taken its rate far down."""
    model = model_of()
    optimizer = MoFaSGD(model, rank=3, **EARLIER)
    scheduler = LambdaLR(optimizer, lambda step: 0.1)
    step(model, optimizer, 0)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 2e-3
    state = getattr(optimizer, form)()

    other = model_of()
    resumed = MoFaSGD(other, rank=3, **NOW)
    before = {name: weight.detach().clone() for name, weight in other.named_parameters()}
    with pytest.raises(OptionError, match=f"the checkpoint's initial_{FAR}"):
        resumed.load_state_dict(state)
    assert resumed.matrices.steps == 0 and resumed.param_groups[0]["lr"] == NOW["lr"]
    assert all(torch.equal(weight, before[name]) for name, weight in other.named_parameters())
    MoFaSGD(other, rank=3, **EARLIER).load_state_dict(state)
