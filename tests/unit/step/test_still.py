"""A matrix without a gradient does nothing in that step, as under torch.optim: like the dense reference, bit by bit."""

import copy
import itertools
import logging
import math

import pytest
import torch
from torch import nn

from ds_mofa import GaLore, MoFaSGD
from ds_mofa.linalg.factors import gradient_came, waiting_factors
from tests.galore_reference import GaLoreReference
from tests.ranks.toys import Resting, batches, including
from tests.reference import Reference
from tests.unit.dense_reference import departure_from_orthonormal, relative_error

STEPS = 6
OPTIONS = {"lr": 2e-3, "rank": 4, "weight_decay": 0.1, "adamw_eps": 1e-6}
GALORE = {**OPTIONS, "alpha": 0.5, "eps": 1e-3, "betas": (0.9, 0.999)}
KINDS = {
    "plain": (MoFaSGD, {}),
    "hook": (MoFaSGD, {"capture": "hook"}),
    "balance": (MoFaSGD, {"balance": 0.5}),
    "explore": (MoFaSGD, {"explore": 3, "explore_scale": 2.0, "balance": 0.5}),
    "GaLore 3": (GaLore, {"refresh_every": 3}),
    "GaLore 100": (GaLore, {"refresh_every": 100}),
}
KIND = pytest.mark.parametrize("kind", KINDS)


def resting(dtype=torch.float64):
    torch.manual_seed(0)
    return Resting().to(dtype)


def optimizer_of(kind, model, **more):
    optimizer, options = KINDS[kind]
    given = {**(GALORE if optimizer is GaLore else OPTIONS), **options, **more}
    return optimizer(model, **given, **including(model))


def train(model, optimizer, data, clip=None):
    norms = []
    for batch in data:
        model(*batch).backward()
        if clip is not None:
            norms.append(float(optimizer.clip_grad_norm_(clip)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def reference_of(kind, clip):
    optimizer, options = KINDS[kind]
    rest = {key: value for key, value in options.items() if key != "capture"}
    settings = {"lr": 2e-3, "rank": 4, "weight_decay": 0.1, "adamw_eps": 1e-6, "clip": clip or 0.0, **rest}
    if optimizer is GaLore:
        settings |= {key: GALORE[key] for key in ("alpha", "eps", "betas")} | {"adamw_lr": lambda step: 2e-3}
        return GaLoreReference(resting(), Resting.MATRICES, **settings)
    return Reference(resting(), Resting.MATRICES, beta=0.85, **settings)


# ---------------------------------------------------------------------- against the reference


@KIND
@pytest.mark.parametrize("clip", [None, 0.2])
def test_matrices_that_rest_agree_with_the_dense_reference(kind, clip):
    """One unused in two steps, one before the third, one frozen after the second."""
    model, reference = resting(), reference_of(kind, clip)
    norms = train(model, optimizer_of(kind, model), batches(STEPS), clip)
    for number, batch in enumerate(batches(STEPS)):
        reference.step(batch)
        if clip:
            assert norms[number] == pytest.approx(reference.norm, rel=1e-6)  # added up in fp32
    bound = 1e-6 if clip else 1e-8 if KINDS[kind][0] is GaLore else 1e-9  # singular vectors turn by rounding over a gap
    for name, expected in reference.weights().items():
        assert relative_error(model.get_parameter(name), expected) < bound, name


@KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
def test_what_rests_keeps_every_bit(kind, dtype, masters):
    """Weights, masters, state and working copies; and it goes on when its gradient comes again."""
    model = resting(dtype)
    optimizer = optimizer_of(kind, model, master_weights=masters)
    step = optimizer.matrices
    places = {name: Resting.MATRICES.index(name) for name in ("spare.weight", "late.weight", "fixed.weight")}

    def everything():
        found = {}
        for name, index in places.items():
            found[name] = [model.get_parameter(name).detach().clone()]
            found[name] += [one.clone() for one in step.owner.state_layout.views(step.factors, index)]
            found[name] += [master.clone() for master in step.masters.of([index]) or ()]
        return found

    rests = {"spare.weight": (2, 3), "late.weight": (1, 2), "fixed.weight": (3, 4, 5, 6)}
    before = everything()
    for number, batch in enumerate(batches(STEPS), start=1):
        train(model, optimizer, [batch])
        after = everything()
        for name, steps in rests.items():
            kept = [torch.equal(one, other) for one, other in zip(before[name], after[name], strict=True)]
            if number in steps and number > 1:
                assert all(kept), (name, number)
            elif number in steps:  # the first: its factors wait in random directions
                assert kept[0] and (not masters or dtype == torch.float32 or kept[-1])
            else:
                assert not all(kept), (name, number)  # a bf16 weight beside a master need not move in one step
        before = after


@pytest.mark.parametrize("rule", ["spectral", "inverse_sigma"])
def test_balance_does_not_count_what_rests(rule):
    """The others move as in a model without it, while it rests and with a momentum of its own."""
    ends = []
    units = {"lr": 1e-2, "adamw_lr": 1e-3, "adjust_lr_fn": "match_rms_adamw"}
    for with_it in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 9, bias=False), nn.Linear(9, 7, bias=False)).double()
        torch.manual_seed(1)
        extra = nn.Linear(8, 8, bias=False).double()
        whole = nn.ModuleList([model, extra] if with_it else [model])
        optimizer = MoFaSGD(whole, rank=3, balance=0.5, update_rule=rule, inverse_sigma_clamp=50.0, **units)
        if with_it:  # a momentum far from the others', and from there on no gradient
            (100 * extra(torch.ones(2, 8).double())).square().sum().backward()
            optimizer.step()
        else:
            optimizer.step()
        for number in range(5):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(number)).double()
            model(x).square().mean().backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        assert relative_error(one, other) < 1e-12


# ---------------------------------------------------------------------- before the first gradient


@KIND
def test_no_gradient_at_all_in_the_first_steps(kind):
    model = resting(torch.float32)
    before = copy.deepcopy(model.state_dict())
    optimizer = optimizer_of(kind, model)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.matrices.steps == 3 and optimizer.matrices.skipped == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    losses = [float(model(*batch).detach()) for batch in batches(1)]
    for batch in batches(25)[:1] * 25:
        train(model, optimizer, [batch])
    losses += [float(model(*batch).detach()) for batch in batches(1)]
    assert losses[1] < losses[0] - 0.2
    moved = [name for name in Resting.MATRICES if not torch.equal(model.get_parameter(name), before[name])]
    assert moved == Resting.MATRICES


def test_a_late_matrix_is_met_by_random_directions():
    """Coordinate directions would miss a gradient that lives on other coordinates."""
    torch.manual_seed(0)
    used, late = nn.Linear(20, 30, bias=False), nn.Linear(20, 30, bias=False)
    optimizer = MoFaSGD(nn.ModuleList([used, late]), rank=3, lr=2e-3)
    x = torch.randn(40, 20)
    for _ in range(2):
        used(x).square().mean().backward()
        optimizer.step()
    state = optimizer.named_state_dict()["mofasgd"]["matrices"]["1.weight"]
    assert state["sigma"].eq(0).all()
    for one in (state["U"], state["V"]):
        assert departure_from_orthonormal(one) < 1e-6
        assert one.abs().amax() < 0.95 and one.ne(0).all()
    before = late.weight.detach().clone()
    rows = torch.zeros(40, 30)
    rows[:, 25:] = torch.randn(40, 5)  # a gradient in the last five rows alone
    (late(x) * rows).sum().backward()
    optimizer.step()
    moved = late.weight.detach() - before
    assert moved[25:].norm() > 0.5 * moved.norm() > 0


@KIND
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, at):
    """Saved while one matrix waits for its first gradient, and others rest."""
    data = batches(STEPS)
    model = resting(torch.float32)
    optimizer = optimizer_of(kind, model)
    train(model, optimizer, data[:at])
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, data[at:])
    other = resting(torch.float32)
    other.load_state_dict(saved["model"])
    other.step = at
    second = optimizer_of(kind, other)
    second.load_state_dict(saved["optimizer"])
    train(other, second, data[at:])
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# ---------------------------------------------------------------------- what is no gradient, and what is none


@KIND
@pytest.mark.parametrize("started", [0, 1, 4])
@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_beside_zeros_is_no_rest(kind, started, side, caplog):
    """In a sketch that is zero elsewhere: the step is left out, and what rested still does in the next."""
    caplog.set_level(logging.ERROR, logger="ds_mofa")
    model = resting(torch.float32)
    optimizer = optimizer_of(kind, model)
    data = batches(STEPS)
    train(model, optimizer, data[:started])
    before = copy.deepcopy((model.state_dict(), optimizer.named_state_dict()["mofasgd"]["matrices"]))
    step = optimizer.matrices
    index = Resting.MATRICES.index("late.weight")  # square
    # GaLore does not look at a side that it has no use for.
    seen = side == 0 or KINDS[kind][0] is MoFaSGD or started < 3
    step.layout.views(step.sketches, index)[side][-1, -1] = math.nan
    optimizer.step()
    if seen:
        assert step.skipped == 1
        after = (model.state_dict(), optimizer.named_state_dict()["mofasgd"]["matrices"])
        assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
        assert all(torch.equal(after[1][n][key], v) for n, one in before[1].items() for key, v in one.items())
    train(model, optimizer, data[started:])
    assert all(torch.isfinite(param).all() for param in model.parameters())


@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 1, 1)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.0, 1e-45, -1e-45])
def test_whatever_is_not_zero_is_a_gradient(shape, value):
    zero = torch.zeros(shape)
    assert not gradient_came(zero, zero).any() and not gradient_came(-zero, zero).any()
    for place in itertools.product(*map(range, shape)):
        one = zero.clone()
        one[place] = value
        expected = torch.arange(shape[0]) == place[0]
        assert torch.equal(gradient_came(one, zero), expected) and torch.equal(gradient_came(zero, one), expected)


def test_waiting_factors_span_the_test_matrices():
    psi, omega = torch.randn(2, 9, 3).double(), torch.randn(2, 7, 3).double()
    U, sigma, V = waiting_factors(psi, omega)
    assert not sigma.any() and sigma.shape == (2, 3)
    for basis, test in ((U, psi), (V, omega)):
        assert departure_from_orthonormal(basis) < 1e-12
        assert relative_error(basis @ (basis.mT @ test), test) < 1e-12


def test_a_gradient_that_is_zero_is_none():
    """A loss without weight, or all of whose labels are ignored: after the ranks' mean nothing tells it apart."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    optimizer = MoFaSGD(nn.ModuleList([layer]), rank=2, weight_decay=0.5)
    x = torch.randn(4, 6)
    layer(x).square().sum().backward()
    optimizer.step()
    before = layer.weight.detach().clone()
    (0 * layer(x).square().sum()).backward()
    optimizer.step()
    assert torch.equal(layer.weight, before)
