"""What param groups may say: their rates, their labels, and what is refused by name."""

import math

import numpy
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR
from torch.optim.swa_utils import SWALR

from ds_mofa import GaLore, MoFaSGD, OptionError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def built(*groups, optimizer=MoFaSGD, **options):
    torch.manual_seed(0)
    model = Model()
    halves = [list(model.first.parameters()), list(model.second.parameters())]
    handed = [{"params": params, **group} for params, group in zip(halves, [*groups, {}][:2])]
    return model, optimizer(handed, model=model, **{"rank": 4, "lr": 2e-3, **options})


def backward(model):
    model(torch.ones(3, 16)).square().sum().backward()


REFUSED = [
    ({"lr": -1.0}, r"param group 1 \('tail'\): lr=-1.0 must be >= 0"),
    ({"lr": math.nan}, "lr=nan must be >= 0"),
    ({"lr": math.inf}, "lr=inf must be >= 0"),
    ({"lr": "auto"}, "lr='auto' must be a number >= 0"),
    ({"lr": torch.tensor(-1.0)}, "lr=-1.0 must be >= 0"),
    ({"lr": None}, "lr=None must be a number >= 0"),
    ({"weight_decay": -5}, "weight_decay=-5 must be >= 0"),
    ({"weight_decay": "0.1"}, "weight_decay='0.1' must be a number"),
    ({"betas": (0.5, 1.0)}, "betas=1.0 must be >= 0 and < 1"),
    ({"betas": 0.9}, "betas=0.9 must be two numbers"),
    ({"eps": 0}, "eps=0 must be > 0"),
    ({"rank": 2}, "'rank' is an option of the whole optimizer: give it to MoFaSGD"),
    ({"adamw_lr": 1e-4}, "'adamw_lr' is an option of the whole optimizer"),
    ({"weight_deacy": 0.1}, "unknown key 'weight_deacy'; did you mean 'weight_decay'?.*takes params, lr, weight_decay"),
    ({"weight_deacy": "0.1"}, "unknown key 'weight_deacy'; did you mean 'weight_decay'?"),
    ({"momentum": 0.9}, "unknown key 'momentum'"),
    ({"lr_scale": 0.5}, 'write the group\'s own "lr", scaled'),
    ({"maximize": True}, "maximize=True is not what MoFaSGD does"),
    ({"decoupled_weight_decay": False}, "decoupled_weight_decay=False is not what MoFaSGD does"),
]


@pytest.mark.parametrize(("group", "message"), REFUSED, ids=[str(group) for group, _ in REFUSED])
def test_what_cannot_be_right_is_refused_by_the_name_of_its_group(group, message):
    with pytest.raises(OptionError, match=f"param group 1.*{message.removeprefix('param group 1')}"):
        built({"name": "head"}, {"name": "tail", **group})


def test_a_group_without_parameters_is_refused():
    model = Model()
    with pytest.raises(OptionError, match='param group 0 has no "params"'):
        MoFaSGD([{"param": list(model.parameters())}], model=model, rank=4)


ADAMW = torch.optim.AdamW([nn.Parameter(torch.ones(1))]).param_groups[0]
TAKEN = [
    {"lr": 0},
    {"lr": numpy.float32(5e-4), "weight_decay": numpy.float64(0.1)},
    {"lr": torch.tensor(5e-4)},
    {"betas": [0.5, 0.6], "eps": 1e-5},
    {"name": "tail", "layer": "3", "tags": ["a", "b"]},
    {"initial_lr": 1e-3, "max_lr": 2e-3, "min_lr": 0.0, "swa_lr": 0.1, "max_momentum": 0.9},
    {"moe": False, "use_muon": False, "bias_correction": True, "step": 3},
    {key: value for key, value in ADAMW.items() if key != "params"},
]


@pytest.mark.parametrize("group", TAKEN, ids=str)
@pytest.mark.parametrize("optimizer", [MoFaSGD, GaLore])
def test_what_other_libraries_put_there_is_taken(group, optimizer):
    model, built_one = built({}, group, optimizer=optimizer)
    for _ in range(2):
        backward(model)
        built_one.step()


def test_a_group_s_rate_is_told_from_those_of_earlier_versions():
    with pytest.raises(
        OptionError,
        match=r"param group 0 \('tail'\): lr=0\.006 is far above AdamW's.*write 0\.0012 there, half of the optimizer's lr",
    ):
        built({"lr": 6e-3, "name": "tail"})
    built({"lr": 6e-3}, adjust_lr_fn="adamw")
    built({"lr": 6e-3}, optimizer=GaLore)


def test_named_parameters_are_taken_as_torch_takes_them():
    model = Model()
    named = [{"params": list(model.named_parameters()), "lr": 1e-3}]
    for given in (named, list(model.named_parameters()), torch.optim.AdamW(named).param_groups):
        optimizer = MoFaSGD(given, model=model, rank=4)
        names = [group["param_names"] for group in optimizer.param_groups]
        assert names == [["first.weight", "second.weight"], ["first.bias", "second.bias"]]
        assert [group["param_names"] for group in optimizer.state_dict()["param_groups"]] == names
        optimizer.matrices.detach()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: OneCycleLR(o, max_lr=2e-3, total_steps=9, cycle_momentum=False),
        lambda o: CyclicLR(o, 1e-3, 2e-3, cycle_momentum=False),
        lambda o: SWALR(o, swa_lr=1e-3),
    ],
    ids=["OneCycleLR", "CyclicLR", "SWALR"],
)
def test_groups_of_a_scheduled_optimizer_may_be_handed_on(schedule):
    """What a schedule writes into groups is theirs, and no misspelling."""
    model = Model()
    before = torch.optim.AdamW([{"params": list(model.parameters()), "name": "all"}], lr=1e-3)
    schedule(before)
    MoFaSGD(before.param_groups, model=model, rank=4)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf, torch.tensor(math.nan)])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_schedule_gone_wrong_moves_nothing(key, value, number):
    model, optimizer = built({"name": "a"}, {"name": "b"}, weight_decay=0.1)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    before = [param.detach().clone() for param in model.parameters()]
    factors, kept = optimizer.matrices.factors.clone(), optimizer.param_groups[number][key]
    backward(model)
    optimizer.param_groups[number][key] = value
    where = rf"before this step, param group {number} \('{'ab'[number % 2]}'\)"
    with pytest.raises(OptionError, match=f"{where}: {key}=.* must be >= 0"):
        optimizer.step()
    assert all(torch.equal(param, weight) for param, weight in zip(model.parameters(), before))
    assert torch.equal(optimizer.matrices.factors, factors) and optimizer.matrices.steps == 1
    optimizer.param_groups[number][key] = kept
    optimizer.step()
    assert all(not torch.equal(param, weight) for param, weight in zip(model.parameters(), before))


@pytest.mark.parametrize(("adamw_lr", "ratio"), [(1e-3, 0.1), (4e-3, 0.4), (0.0, 0.0)])
def test_layer_wise_rates_scale_both_parts_by_one_ratio(adamw_lr, ratio):
    """By what the weights move, through a schedule, and after a state is loaded."""
    for again in (False, True):
        options = {"adamw_lr": adamw_lr, "adamw_betas": (0.0, 0.0), "adamw_eps": 1e-12, "adjust_lr_fn": "none"}
        model, optimizer = built({"lr": 1e-2 * 0.9}, {}, lr=1e-2, **options)
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(3):
            if again:
                optimizer.load_state_dict(optimizer.state_dict())
            before = {name: param.detach().clone() for name, param in model.named_parameters()}
            backward(model)
            optimizer.step()
            optimizer.zero_grad()
            moved = {name: (param.detach() - before[name]) for name, param in model.named_parameters()}
            lr = 1e-2 / (1 + step)
            for layer, share in (("first", 0.9), ("second", 1.0)):
                # Without memory AdamW's step is a sign; the spectral update has an entry 1 for each live direction.
                sign = float(moved[f"{layer}.bias"].abs().max())
                assert sign == pytest.approx(share * lr * ratio, rel=1e-3, abs=1e-9)
                size = torch.linalg.matrix_norm(moved[f"{layer}.weight"], 2)
                assert float(size) == pytest.approx(share * lr, rel=1e-3)
            scheduler.step()
