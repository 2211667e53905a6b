"""Learning-rate schedules and param groups: one schedule moves every group, matrices' and AdamW's, in every stage."""

import functools
import re

import pytest
import torch
from comparing import STEPS, assert_same, dense
from deepspeed.runtime import lr_schedules
from launching import on_ranks
from toys import Toy, batches
from training import OPTIONS, config, engine_for, toy, train, train_step, whole_weights

SCHEDULES = {
    "WarmupLR": {"warmup_min_lr": 2e-4, "warmup_max_lr": 2e-3, "warmup_num_steps": 4, "warmup_type": "linear"},
    "WarmupDecayLR": {"total_num_steps": 6, "warmup_max_lr": 2e-3, "warmup_num_steps": 3, "warmup_type": "linear"},
}
NO_DECAY = ["up.bias", "norm.weight", "norm.bias"]


def configured(stage: int, schedule: str) -> dict:
    return train(config(stage, scheduler={"type": schedule, "params": SCHEDULES[schedule]}), STEPS)


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def called(stage: int) -> dict:
    """A client's scheduler, given as a callable, and param groups of which one has no weight decay."""
    model = toy()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if name not in NO_DECAY]},
        {"params": [trained[name] for name in NO_DECAY], "weight_decay": 0.0},
    ]
    return train(config(stage), STEPS, model=model, groups=groups, lr_scheduler=halving)


@functools.cache
def rates(schedule: str) -> list[float]:
    """The schedule on an optimizer of one group, after each step."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=OPTIONS["lr"])
    scheduler = getattr(lr_schedules, schedule)(optimizer, **SCHEDULES[schedule])
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return found


def gone_wrong(stage: int) -> dict:
    """The second step has a learning rate that is no number, the third is as it should be."""
    with engine_for(config(stage)) as engine:
        first, second = batches(2)
        train_step(engine, first)
        before, group = whole_weights(engine.module), engine.optimizer.param_groups[0]
        lr, group["lr"] = group["lr"], float("nan")
        try:
            train_step(engine, second)
            message = ""
        except ValueError as error:
            message = str(error)
        after, group["lr"] = whole_weights(engine.module), lr
        return {"message": message, "before": before, "after": after}


@on_ranks(gone_wrong, stage=[0, 1, 2, 3])
def test_a_schedule_gone_wrong_moves_nothing(ran):
    for result in ran.ranks:
        assert "before this step, param group 0: lr=nan must be >= 0" in result["message"]
        assert all(torch.equal(result["after"][name], weight) for name, weight in result["before"].items())


def deepspeeds_own(optimizer):
    return lr_schedules.WarmupLR(optimizer, **BEYOND["WarmupLR"])


# How far they go is beyond AdamW's rates, and where they start is not.
BEYOND = {
    "WarmupLR": {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-2, "warmup_num_steps": 4},
    "WarmupDecayLR": {"total_num_steps": 6, "warmup_max_lr": 1e-2, "warmup_num_steps": 3},
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2, "cycle_first_step_size": 4, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 1e-2, "total_steps": 6, "cycle_momentum": False},  # of torch's
    "a client's": deepspeeds_own,
}


def beyond(stage: int, schedule: str) -> dict:
    """An engine with such a schedule; the same model in one that says that it is meant; a resumed run that does not."""
    model, params = toy(), BEYOND[schedule]
    client = {"lr_scheduler": params} if callable(params) else {}
    named = {} if client else {"scheduler": {"type": schedule, "params": params}}
    found = {"start": refusal(config(stage, **named), model, **client)}
    losses = []
    with engine_for(config(stage, options={"adjust_lr_fn": "adamw"}, **named), model=model, **client) as engine:
        losses += [train_step(engine, batch) for batch in batches(3)]
        engine.save_checkpoint("saved")
        rates = [group["lr"] for group in engine.optimizer.param_groups]
    with engine_for(config(stage)) as engine:
        try:
            engine.load_checkpoint("saved")
            found["resumed"] = ""
        except ValueError as error:
            found["resumed"] = str(error)
        found["steps"] = engine.global_steps
    return {**found, "losses": losses, "rates": rates}


def refusal(settings: dict, model, **client) -> str:
    try:
        with engine_for(settings, model=model, **client):
            return ""
    except ValueError as error:
        return str(error)


@on_ranks(
    beyond,
    stage=[0, 1, 2, 3],
    schedule=list(BEYOND),
    keeps=lambda world, stage, schedule: stage == 2 or schedule == "WarmupLR",
)
def test_how_far_a_schedule_goes_is_told_at_the_start(ran):
    """And a resumed run is told the same, where the checkpoint's rate has come so far."""
    for result in ran.ranks:
        place = "param group 0: " if ran.schedule == "OneCycleLR" else "the scheduler's "
        assert result["start"].startswith(f"{place}max_lr=0.01 is far above AdamW's rates"), result["start"]
        assert "write 0.002 there" in result["start"] and 'adjust_lr_fn="adamw"' in result["start"]
        assert max(result["rates"]) > 2e-3 and len(result["losses"]) == 3
        assert re.search(r"the checkpoint's (max_)?lr=0\.0\d+ is far above AdamW's rates", result["resumed"]), result[
            "resumed"
        ]
        assert result["steps"] == 0


@on_ranks(configured, stage=[0, 1, 2, 3], schedule=list(SCHEDULES))
def test_deepspeeds_schedules_move_every_group(ran):
    wanted = rates(ran.schedule)
    assert len(set(wanted)) > 3, "the schedule stands still"
    for result in ran.ranks:
        for step, lr in enumerate(wanted):
            assert len(result["lr"][step]) == 2  # the matrices' group and AdamW's
            assert result["lr"][step] == pytest.approx([lr, lr])
    assert_same(ran, dense(lr=_stepwise(ran.schedule)))


@on_ranks(called, stage=[0, 1, 2, 3])
def test_a_callable_schedule_and_a_group_without_decay_agree_with_the_reference(ran):
    assert [len(set(lrs)) for lrs in ran.ranks[0]["lr"]] == [1] * STEPS
    assert len(ran.ranks[0]["lr"][0]) == 3  # the matrices', and AdamW's with and without decay
    assert_same(ran, dense(lr=_halved, no_decay=tuple(NO_DECAY)))


def test_the_schedules_and_the_decay_make_a_difference():
    weights = [dense(lr=_halved, no_decay=tuple(NO_DECAY)), dense(lr=_halved), dense()]
    with_none, with_decay, constant = (result["weights"] for result in weights)
    assert (with_none["norm.weight"] - with_decay["norm.weight"]).norm() > 1e-4 * with_decay["norm.weight"].norm()
    for name in Toy.MATRICES:
        assert (with_decay[name] - constant[name]).norm() > 1e-2 * constant[name].norm()


@functools.cache
def _stepwise(schedule: str):
    return lambda step: rates(schedule)[step - 1]


def _halved(step: int) -> float:
    return OPTIONS["lr"] * 0.5 ** (step - 1)
