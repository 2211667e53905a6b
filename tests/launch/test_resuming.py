"""After a resume, what the checkpoint puts in force in the place of the command's is named, or put back."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ds_mofa import GaLore, MoFaSGD
from launch.resuming import differences, enforce, in_force, reschedule, settings


def make(kind: str, lr: float, decay: float, eps: float = 1e-8):
    """(optimizer, schedule): half the rate at step 1, a quarter at step 2, and so on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    if kind == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, eps=eps)
    else:
        options = {"lr": lr, "rank": 4, "weight_decay": decay, "adamw_lr": lr / 2, "adamw_eps": eps}
        optimizer = {"MoFaSGD": MoFaSGD, "GaLore": GaLore}[kind](model, **options)
    return model, optimizer, LambdaLR(optimizer, lambda step: 0.5**step)


def step(model, optimizer, scheduler) -> None:
    model(torch.ones(2, 16)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()


def resume(kind: str):
    """A run of lr 2e-4 and decay 0.1, resumed at step 2 with 8e-4 and 0; (what was asked, the new run's parts)."""
    old = make(kind, 2e-4, 0.1)
    step(*old), step(*old)
    _, optimizer, scheduler = new = make(kind, 8e-4, 0.0, eps=1e-6)
    asked = settings(optimizer, scheduler)
    optimizer.load_state_dict(old[1].state_dict())
    scheduler.load_state_dict(old[2].state_dict())
    return asked, new


NAMED = {
    "AdamW": {"lr": ("0.0002", "0.0008"), "weight_decay": ("0.1", "0"), "eps": ("1e-08", "1e-06")},
    "MoFaSGD": {
        "lr": ("0.0002", "0.0008"), "weight_decay": ("0.1", "0"), "adamw_lr": ("0.0001", "0.0004"),
        "adamw_weight_decay": ("0.1", "0"), "adamw_eps": ("1e-08", "1e-06"),
    },
}  # fmt: skip
NAMED["GaLore"] = NAMED["MoFaSGD"]


@pytest.mark.parametrize("kind", NAMED)
def test_what_the_checkpoint_puts_in_force_is_named(kind):
    asked, (_, optimizer, scheduler) = resume(kind)
    lines = differences(asked, settings(optimizer, scheduler))
    assert sorted(lines) == sorted(
        f"resumed: {name} {theirs} of the checkpoint is in force, not {ours} of the command line or the JSON; "
        "to change it, add --override_checkpoint"
        for name, (theirs, ours) in NAMED[kind].items()
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-4 / 4)  # the line says the truth


@pytest.mark.parametrize("kind", NAMED)
def test_the_way_out_works(kind):
    """With it the rest of the run is trained as the command says, from where the schedule was."""
    asked, (model, optimizer, scheduler) = resume(kind)
    enforce(optimizer, scheduler, asked)
    assert differences(asked, settings(optimizer, scheduler)) == []
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([8e-4 / 4] * len(optimizer.param_groups))
    step(model, optimizer, scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([8e-4 / 8] * len(optimizer.param_groups))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_nothing_is_said_where_nothing_differs():
    asked, (_, optimizer, scheduler) = resume("MoFaSGD")
    assert differences(asked, asked) == []


def test_another_rate_of_the_matrices_alone_is_one_line():
    """AdamW's own stays, though its group holds it as a ratio."""
    asked = [{"lr": 8e-4, "weight_decay": 0.0}, {"lr": 8e-4, "lr_scale": 1e-4 / 8e-4}]
    loaded = [{"lr": 2e-4, "weight_decay": 0.0}, {"lr": 2e-4, "lr_scale": 1e-4 / 2e-4}]
    assert [line.split()[1] for line in differences(asked, loaded)] == ["lr"]


def test_a_schedule_of_deepspeed_s_has_its_own_rates_at_once():
    """They are not in its state: what the load has left in the groups would be in force for one step."""
    from deepspeed.runtime.lr_schedules import WarmupLR

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = WarmupLR(optimizer, warmup_max_lr=8e-3, warmup_num_steps=2)
    asked = settings(optimizer, scheduler)
    scheduler.load_state_dict({"last_batch_iteration": 5})
    optimizer.param_groups[0]["lr"] = 2e-3
    reschedule(scheduler)
    assert optimizer.param_groups[0]["lr"] == 8e-3
    assert differences(asked, settings(optimizer, scheduler)) == []
    reschedule(SimpleNamespace())  # one that it does not know stays as it is


@pytest.mark.parametrize("kind", NAMED)
def test_a_finished_run_that_goes_on_takes_its_first_step_at_the_command_s_rate(kind):
    """A linear schedule of 2 steps has ended at 0; of the 4 that the command asks for, half are done."""
    parts = []
    for steps in (2, 4):
        model, optimizer, _ = make(kind, 2e-4, 0.1)
        parts.append((model, optimizer, LambdaLR(optimizer, lambda done, steps=steps: 1 - done / steps)))
    old, (model, optimizer, scheduler) = parts
    step(*old), step(*old)
    optimizer.load_state_dict(old[1].state_dict())
    scheduler.load_state_dict(old[2].state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [0.0] * len(optimizer.param_groups)  # as it was
    reschedule(scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4] * len(optimizer.param_groups)
    assert scheduler.get_last_lr() == [1e-4] * len(optimizer.param_groups)
    step(model, optimizer, scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5] * len(optimizer.param_groups)


@pytest.mark.parametrize("kind", NAMED)
def test_rescheduling_an_uninterrupted_schedule_changes_no_bit(kind):
    model, optimizer, scheduler = parts = make(kind, 3e-4, 0.1)
    step(*parts)
    before = [group["lr"] for group in optimizer.param_groups]
    reschedule(scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == before


@pytest.mark.parametrize("kind", NAMED)
def test_the_rates_in_force_are_those_of_the_groups(kind):
    parts = make(kind, 2e-4, 0.1)
    rates = "lr 0.0002" if kind == "AdamW" else "lr 0.0002, adamw_lr 0.0001"
    assert in_force(*parts[1:]) == rates
    step(*parts)
    now = ("lr 0.0002 (now 0.0001)", ", adamw_lr 0.0001 (now 5e-05)")
    assert in_force(*parts[1:]) == now[0] + (now[1] if kind != "AdamW" else "")
