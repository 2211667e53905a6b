"""MoFaSGD in a plain PyTorch loop: against a dense step in float64, with schedulers, clipping, states and masters."""

import copy
import io
import math
import statistics
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from ds_mofa import MoFaSGD, OptionError, Options
from ds_mofa.linalg.factors import Factors, update_many
from ds_mofa.optimizers.base import clip_factor
from ds_mofa.rules import mofasgd as mofasgd_rule
from tests.unit.dense_reference import (
    dense,
    departure_from_orthonormal,
    next_momentum,
    relative_error,
    tangent_projection,
    truncated,
)

CAPTURE = pytest.mark.parametrize("capture", ["linear", "hook"])
RULE = pytest.mark.parametrize("update_rule", ["spectral", "inverse_sigma"])
RANK = 4


class Model(nn.Module):
    """Two matrices of one shape, one of another, and norms, biases and an embedding for AdamW."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.third = nn.Linear(8, 10)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + torch.tanh(self.first(x))
        return self.third(self.norm(x + torch.tanh(self.second(x))))


MATRICES = ["first.weight", "second.weight", "third.weight"]


def build(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Model().to(dtype)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 13, (16, 3), generator=generator)
    return tokens, (tokens * 7 + 3) % 10


def loss_of(model, step):
    tokens, targets = batch(step)
    return F.cross_entropy(model(tokens).flatten(0, 1).double(), targets.flatten())


# A rate of earlier versions, in whose units the numbers of this file are.
RATE = {"lr": 1e-2, "adamw_lr": 1e-3, "adjust_lr_fn": "match_rms_adamw"}


def optimizer_of(model, **options):
    return MoFaSGD(model, **{"rank": RANK, **RATE, **options})


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def weights_of(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def factors_of(optimizer):
    state = optimizer.named_state_dict()["mofasgd"]["matrices"]
    return {name: Factors(*(part[None] for part in (f["U"], f["sigma"], f["V"]))) for name, f in state.items()}


# ---------------------------------------------------------------------- one step, by hand


@CAPTURE
@RULE
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("adjust_lr_fn, balance", [("match_rms_adamw", 0.0), ("none", 0.0), ("match_rms_adamw", 0.5)])
def test_a_step_is_the_dense_one(capture, update_rule, micro_batches, adjust_lr_fn, balance):
    """Every step after the first, which starts the momentum, from nothing but whole matrices and an SVD."""
    options = {"weight_decay": 0.1, "adamw_lr": 2e-3, "update_rule": update_rule, "adjust_lr_fn": adjust_lr_fn}
    options |= {"beta": 0.7, "inverse_sigma_clamp": 200.0, "balance": balance}
    model = build()
    optimizer = optimizer_of(model, capture=capture, **options)
    train(model, optimizer, range(2))

    plain = build()
    plain.load_state_dict(model.state_dict())
    rest = {name: p for name, p in plain.named_parameters() if name not in MATRICES}
    adamw = torch.optim.AdamW(rest.values(), lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    state = copy.deepcopy(optimizer.adamw.state_dict())
    adamw.load_state_dict({**state, "param_groups": adamw.state_dict()["param_groups"]})
    momentum = factors_of(optimizer)

    for step in range(2, 7):
        optimizer.zero_grad()
        plain.zero_grad()
        for i in range(micro_batches):
            (loss_of(model, 10 * step + i) / micro_batches).backward()
            (loss_of(plain, 10 * step + i) / micro_batches).backward()
        optimizer.step()
        adamw.step()
        for name in MATRICES:
            weight = plain.get_parameter(name)
            M = next_momentum(momentum[name], weight.grad[None], beta=0.7, gamma=0.3)
            P, sigma, Qt = torch.linalg.svd(M, full_matrices=False)
            momentum[name] = Factors(P[..., :RANK], sigma[..., :RANK], Qt[..., :RANK, :].mT)
        norms = {name: float(momentum[name].sigma.norm()) for name in MATRICES}
        for name in MATRICES:
            weight = plain.get_parameter(name)
            U, sigma, V = momentum[name]
            scale = torch.ones_like(sigma) if update_rule == "spectral" else (1 / sigma).clamp_max(200.0)
            factor = 0.2 * math.sqrt(max(weight.shape)) if adjust_lr_fn == "match_rms_adamw" else 1.0
            factor *= (statistics.geometric_mean(norms.values()) / norms[name]) ** balance
            with torch.no_grad():
                weight.mul_(1 - 1e-2 * 0.1).sub_((U * scale.unsqueeze(-2) @ V.mT)[0], alpha=1e-2 * factor)
        for name, expected in plain.named_parameters():
            assert relative_error(model.get_parameter(name), expected) < 1e-10, (name, step)
    for name, factors in factors_of(optimizer).items():
        assert relative_error(dense(factors), dense(momentum[name])) < 1e-10


@CAPTURE
def test_the_first_step_starts_from_the_gradient(capture):
    """With gradients of half the rank the start is exact, and so is the first step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7, bias=False)).double()
    before = model[0].weight.detach().clone()
    x, dy = torch.randn(2, 9).double(), torch.randn(2, 7).double()
    optimizer = MoFaSGD(model, rank=4, lr=0.1, beta=0.8, capture=capture, adjust_lr_fn="none", adamw_lr=0.01)
    (model(x) * dy).sum().backward()
    optimizer.step()
    G = dy.T @ x
    assert relative_error(dense(factors_of(optimizer)["0.weight"])[0], 0.2 * G) < 1e-10
    P, _, Qt = torch.linalg.svd(G, full_matrices=False)
    # The two directions without momentum move nothing.
    assert relative_error(model[0].weight, before - 0.1 * P[:, :2] @ Qt[:2]) < 1e-10


def test_balance_is_bounded_and_nothing_moves_without_momentum():
    """Two matrices whose gradients are 10^8 apart, and one without: 10 times the length is the most that one gets."""
    moved = {}
    for balance in (0.0, 1.0):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3))).double()
        before = [layer.weight.detach().clone() for layer in model]
        optimizer = MoFaSGD(model, rank=4, lr=0.02, adjust_lr_fn="adamw", balance=balance)
        x = torch.randn(5, 8).double()
        (model[0](x) * 1e4).square().sum().add((model[1](x) * 1e-4).square().sum()).backward()
        optimizer.step()
        moved[balance] = [float((layer.weight.detach() - weight).norm()) for layer, weight in zip(model, before)]
    large, small, none = (with_it / max(without, 1e-300) for with_it, without in zip(moved[1.0], moved[0.0]))
    assert (large, small) == pytest.approx((0.1, 10.0), rel=1e-6) and moved[1.0][2] == none == 0


@pytest.mark.parametrize("options", [{}, {"balance": 0.5}, {"balance": 0.5, "explore": 2}], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e12])
def test_the_scale_of_the_gradients_is_no_matter(scale, options):
    """Down to where their squares are zero in fp32: the spectral update, and what balances it, are of degree 0."""
    moved = []
    for factor in (1.0, scale):
        model = build(torch.float32)
        optimizer = optimizer_of(model, **options)
        before = weights_of(model)
        for step in range(3):
            optimizer.zero_grad()
            (loss_of(model, step).float() * factor).backward()
            optimizer.adamw.zero_grad()  # AdamW's eps has a scale
            optimizer.step()
        after = weights_of(model)
        moved.append([after[name] - before[name] for name in MATRICES])
    for one, other in zip(*moved):
        assert relative_error(one, other) < 1e-3


@pytest.mark.parametrize(
    ("options", "most", "allowed"),
    [
        ({"update_rule": "inverse_sigma", "inverse_sigma_clamp": 65505.0}, "65504", {"inverse_sigma_clamp": 65504.0}),
        ({"update_rule": "inverse_sigma", "balance": 0.5}, "6550", {"inverse_sigma_clamp": 6550.0}),
        ({"explore": 2, "explore_scale": 1e5}, "32752", {"explore_scale": 32752.0}),
    ],
)
def test_fp16_matrices_whose_coefficients_would_overflow_are_refused(options, most, allowed):
    model = build(torch.float16)
    with pytest.raises(OptionError, match=f"holds no number above 65504.*at most {most}, or train in bf16"):
        optimizer_of(model, **options)
    assert all("forward" not in vars(module) for module in model.modules())
    optimizer_of(build(torch.bfloat16), **options)
    optimizer_of(model, **{**options, **allowed})


def test_the_largest_coefficients_of_fp16_do_not_overflow():
    """Where the rule says that they fit: both clamp and balance at their ends."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3))).half()
    units = {"adjust_lr_fn": "match_rms_adamw", "adamw_lr": 1e-10}
    clamped = {"update_rule": "inverse_sigma", "inverse_sigma_clamp": 6550.0}
    optimizer = MoFaSGD(model, rank=4, lr=1e-9, balance=1.0, **clamped, **units)
    for _ in range(4):
        x = torch.randn(32, 16).half()
        sum(scale * layer(x).float().square().mean() for layer, scale in zip(model, (1e-4, 1.0, 1e2))).backward()
        optimizer.step()
    assert optimizer.matrices.skipped == 0
    layout, working = optimizer.matrices.layout, optimizer.matrices.working
    largest = max(float(layout.views(working, index)[2].max()) for index in range(3))
    assert largest == torch.tensor(65500.0).half()


def test_the_first_step_ignores_weights_and_global_randomness():
    results = []
    for seed in (0, 1):
        model = build()
        optimizer = optimizer_of(model)
        torch.manual_seed(seed)
        train(model, optimizer, range(1))
        results.append(weights_of(model))
    assert same(*results)


LENGTHS = {"spectral": 2e-2, "inverse_sigma": 1e-2}


def late(losses):
    """The median loss of a run's second half over the mean of its first five: no single step decides."""
    return statistics.median(losses[len(losses) // 2 :]) / statistics.mean(losses[:5])


@CAPTURE
@RULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls(capture, update_rule, dtype):
    model = build(dtype)
    optimizer = optimizer_of(model, lr=LENGTHS[update_rule], update_rule=update_rule, capture=capture)
    losses = train(model, optimizer, range(120))
    assert late(losses) < 0.5  # 0.01 to 0.39 over 24 seeds of weights and batches
    # Steps of 1 / sigma grow as gradients vanish, so single losses of inverse_sigma leap up when all is learnt (the
    # last five came to 0.001 to 1.6 of the first five): where, rounding decides.
    if update_rule == "spectral":
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@RULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved, least", [(0, 0.75), (-1, 1.4)], ids=["still", "uphill"])
def test_it_would_not_fall_so_far_if_matrices_stayed_or_went_uphill(update_rule, dtype, moved, least):
    """The control of the test above: AdamW's part alone comes to 0.82 at best, steps of the wrong sign to 1.56."""
    model = build(dtype)
    optimizer = optimizer_of(model, lr=LENGTHS[update_rule], update_rule=update_rule)
    matrices = [model.get_parameter(name) for name in MATRICES]
    losses = []
    for step in range(120):
        before = [matrix.detach().clone() for matrix in matrices]
        losses += train(model, optimizer, [step])
        with torch.no_grad():
            for matrix, start in zip(matrices, before):
                matrix.copy_(start + moved * (matrix - start))
    assert late(losses) > least


def test_the_matrices_alone_make_the_loss_fall():
    model = build(torch.float32)
    losses = train(model, optimizer_of(model, lr=2e-2, adamw_lr=0.0), range(150))
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def test_both_captures_train_alike():
    results = []
    for capture in ("linear", "hook"):
        model = build()
        train(model, optimizer_of(model, capture=capture), range(10))
        results.append(weights_of(model))
    for name in results[0]:
        assert relative_error(results[1][name], results[0][name]) < 1e-9


def test_factors_stay_orthonormal_in_training():
    model = build(torch.float32)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(100))
    for U, sigma, V in factors_of(optimizer).values():
        assert departure_from_orthonormal(U) < 1e-5 and departure_from_orthonormal(V) < 1e-5
        assert (sigma.diff() <= 0).all() and (sigma > 0).all()


# ---------------------------------------------------------------------- micro-batches and zero_grad


def test_accumulation_moves_the_momentum_once():
    """Four equal micro-batches of a quarter are one whole batch, whatever the optimizer counts."""
    results = []
    for parts in (1, 4):
        model = build()
        optimizer = optimizer_of(model)
        for step in range(4):
            optimizer.zero_grad()
            for _ in range(parts):
                (loss_of(model, step) / parts).backward()
            optimizer.step()
        results.append(weights_of(model))
        assert optimizer.matrices.steps == 4
    for name in results[0]:
        assert relative_error(results[1][name], results[0][name]) < 1e-10


@pytest.mark.parametrize("clipped", [False, True], ids=["", "after clip_grad_norm_"])
@pytest.mark.parametrize("started", [0, 2])
def test_zero_grad_forgets_the_backwards_before_it(clipped, started):
    results = []
    for detour in (False, True):
        model = build()
        optimizer = optimizer_of(model)
        train(model, optimizer, range(started))
        if detour:
            loss_of(model, 99).backward()
            if clipped:
                optimizer.clip_grad_norm_(1e-3)
            optimizer.zero_grad()
        train(model, optimizer, range(10, 12))
        results.append(weights_of(model))
    assert same(*results)


def test_without_zero_grad_nothing_of_a_step_is_left_for_the_next():
    """The sketches are used up by a step; AdamW's gradients add up, as in every torch loop."""
    model = build()
    optimizer = optimizer_of(model)
    loss_of(model, 0).backward()
    optimizer.step()
    assert not optimizer.matrices.sketches.any()


def test_a_step_without_a_backward_leaves_new_weights_alone():
    model = build()
    before = weights_of(model)
    optimizer_of(model).step()
    assert same(weights_of(model), before)


# ---------------------------------------------------------------------- groups and schedulers


def test_param_groups_are_the_matrices_first_and_share_one_lr():
    model = build()
    optimizer = optimizer_of(model, lr=3e-3, adamw_lr=1e-4)
    matrices, rest = optimizer.param_groups
    assert [id(p) for p in matrices["params"]] == [id(model.get_parameter(name)) for name in MATRICES]
    assert len(rest["params"]) == len(list(model.parameters())) - 3
    assert matrices["lr"] == rest["lr"] == 3e-3
    assert rest["lr"] * rest["lr_scale"] == pytest.approx(1e-4)


SCHEDULES = {
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=2e-2, total_steps=8, cycle_momentum=False),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=8),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_torch_schedule_moves_matrices_and_adamw_together(schedule):
    """Against the lengths of the steps that both halves make, not against what the groups say."""
    model = build()
    optimizer = optimizer_of(model, lr=1e-2, adamw_lr=1e-3, adamw_betas=(0.0, 0.0), adjust_lr_fn="none")
    scheduler = SCHEDULES[schedule](optimizer)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    shadow = SCHEDULES[schedule](reference)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" among them
        for step in range(6):
            before = weights_of(model)
            train(model, optimizer, [step])
            after = weights_of(model)
            lr = reference.param_groups[0]["lr"]
            seen.append(lr)
            if step:  # the first has only half the directions
                length = float((after["second.weight"] - before["second.weight"]).norm())
                assert length == pytest.approx(lr * math.sqrt(RANK), rel=1e-6)
            # Without memory AdamW's step is the sign of the gradient.
            assert float((after["third.bias"] - before["third.bias"]).abs().max()) == pytest.approx(lr / 10, rel=1e-3)
            reference.step()
            shadow.step()
            scheduler.step()
    assert len(set(seen)) == 6
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"] == reference.param_groups[0]["lr"]


def test_a_schedule_goes_on_after_a_state_is_loaded():
    """Loading replaces the dicts of AdamW's groups: a scheduler must meet the new ones."""
    model = build()
    optimizer = optimizer_of(model)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, [0])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-3]
    assert [group["lr"] for group in optimizer.adamw.param_groups] == [5e-3]


def test_assigned_param_groups_reach_both_halves():
    """torch assigns them when an optimizer is unpickled, and so do wrappers of optimizers."""
    model = build()
    optimizer = optimizer_of(model)
    optimizer.param_groups = [{**group, "lr": 0.5, "weight_decay": 0.25} for group in optimizer.param_groups]
    for groups in (optimizer.param_groups, [*optimizer.matrix_groups, *optimizer.adamw.param_groups]):
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.5, 0.25)] * 2
    train(model, optimizer, [0])


def test_reduce_on_plateau_sees_every_group():
    optimizer = optimizer_of(build())
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    scheduler.step(1.0)
    scheduler.step(2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(1e-3)] * 2


def test_a_step_leaves_the_scheduled_lr_of_adamw_as_it_is_even_if_it_fails():
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer, [0])
    assert optimizer.adamw_groups[0]["lr"] == 1e-2

    def fails_within() -> None:
        with optimizer.adamw_lr():
            assert optimizer.adamw_groups[0]["lr"] == pytest.approx(1e-3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_within()
    assert optimizer.adamw_groups[0]["lr"] == 1e-2


def test_each_group_steps_at_its_own_lr_and_decay():
    model = build()
    slow = {"params": [model.second.weight], "lr": 1e-3, "weight_decay": 0.5}
    rest = {"params": [p for p in model.parameters() if p is not model.second.weight]}
    optimizer = MoFaSGD([rest, slow], model=model, rank=RANK, lr=1e-2, adamw_lr=1e-3, adjust_lr_fn="none")
    train(model, optimizer, [0])
    before = weights_of(model)
    train(model, optimizer, [1])
    after = weights_of(model)

    def length(name, decay):
        return float((after[name] - decay * before[name]).norm())

    assert length("second.weight", 1 - 1e-3 * 0.5) == pytest.approx(1e-3 * 2, rel=1e-6)
    assert length("first.weight", 1.0) == pytest.approx(1e-2 * 2, rel=1e-6)


def test_a_conv1d_s_transposed_weight_moves_like_the_linear_s():
    """The factor "original" is of the linear map, in one batch with a linear of the other orientation."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, linear, other = Conv1D(8, 32), nn.Linear(32, 8, bias=False), nn.Linear(8, 32, bias=False)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
    assert conv.weight.shape == other.weight.shape  # (32, 8), of maps from 32 to 8 and from 8 to 32
    model = nn.ModuleList([other, conv, linear]).double()
    optimizer = MoFaSGD(model, rank=2, lr=0.1, adamw_lr=0.01, adjust_lr_fn="original", weight_decay=0.5)
    before = weights_of(model)
    x, dy = torch.randn(1, 32).double(), torch.randn(1, 8).double()  # of rank one, that the first step is exact for
    y, dx = torch.randn(1, 8).double(), torch.randn(1, 32).double()
    ((conv(x) * dy).sum() + (linear(x) * dy).sum() + (other(y) * dx).sum()).backward()
    optimizer.step()
    moved = {name: param.detach() - 0.95 * before[name] for name, param in model.named_parameters()}
    assert relative_error(moved["1.weight"], moved["2.weight"].T) < 1e-10
    assert float(moved["2.weight"].norm()) == pytest.approx(0.1)
    assert float(moved["0.weight"].norm()) == pytest.approx(0.1 * 2)  # sqrt(32 / 8)


def test_add_param_group_is_refused():
    optimizer = optimizer_of(build())
    with pytest.raises(OptionError, match="takes all its parameters when it is built"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(8, 8))]})
    assert len(optimizer.param_groups) == 2


def test_parameters_without_their_model_are_refused():
    with pytest.raises(OptionError, match=r"MoFaSGD\(param_groups, model=model"):
        MoFaSGD(build().parameters(), rank=RANK)


def test_a_misspelt_option_is_refused_before_the_model_is_touched():
    model = build()
    with pytest.raises(OptionError, match="did you mean 'rank'"):
        MoFaSGD(model, rnak=4)
    assert "forward" not in vars(model.first)


def test_a_model_of_matrices_alone_needs_no_adamw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False)).double()
    optimizer = MoFaSGD(model, rank=4, lr=2e-3)
    x = torch.randn(32, 8).double()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0] and len(optimizer.param_groups) == 1
    optimizer.load_state_dict(optimizer.state_dict())


# ---------------------------------------------------------------------- clipping


@CAPTURE
def test_the_norm_is_that_of_the_projected_gradient_and_adamw_s(capture):
    model = build()
    optimizer = optimizer_of(model, capture=capture)
    train(model, optimizer, range(3))
    plain = build()
    plain.load_state_dict(model.state_dict())
    optimizer.zero_grad()
    for module in (model, plain):
        loss_of(module, 9).backward()
    square = 0.0
    for name, param in plain.named_parameters():
        grad = param.grad
        if name in MATRICES:
            U, _, V = factors_of(optimizer)[name]
            grad = tangent_projection(U[0], V[0], grad)
        square += float(grad.square().sum())
    norm = optimizer.clip_grad_norm_(1e9)
    assert norm.ndim == 0
    assert float(norm) == pytest.approx(math.sqrt(square), rel=1e-6)


def test_the_first_norm_estimates_the_whole_gradient_s():
    """E |G Omega|^2 = |G|^2: right in the mean over seeds."""
    plain = build()
    loss_of(plain, 0).backward()
    exact = sum(float(plain.get_parameter(name).grad.square().sum()) for name in MATRICES)
    estimates = []
    for seed in range(60):
        model = build()
        optimizer = optimizer_of(model, seed=seed)
        loss_of(model, 0).backward()
        optimizer.clip_grad_norm_(1.0)
        estimates.append(float(optimizer.matrices.norm) ** 2)
    mean, deviation = torch.tensor(estimates).mean(), torch.tensor(estimates).std() / math.sqrt(60)
    assert abs(float(mean) - exact) < 4 * float(deviation) and float(deviation) < 0.1 * exact


def _clipped_step(max_norm, factor=1.0, calls=1):
    """A step with the loss times ``factor``, clipped."""
    model = build()
    optimizer = optimizer_of(model, adamw_eps=1e-3)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    (factor * loss_of(model, 5)).backward()
    norm = None
    for _ in range(calls):
        norm = optimizer.clip_grad_norm_(max_norm)
    optimizer.step()
    return model, optimizer, norm


def test_clipping_is_a_smaller_gradient_not_a_smaller_step():
    _, _, norm = _clipped_step(1e9)
    clipped, by_clipping, same_norm = _clipped_step(0.25 * float(norm))
    assert float(same_norm) == pytest.approx(float(norm))
    scaled, by_scaling, _ = _clipped_step(1e9, factor=0.25)
    for name, expected in weights_of(scaled).items():
        assert relative_error(clipped.get_parameter(name), expected) < 1e-6
    for name, expected in factors_of(by_scaling).items():
        assert relative_error(dense(factors_of(by_clipping)[name]), dense(expected)) < 1e-5
    unclipped, _, _ = _clipped_step(1e9)
    assert relative_error(clipped.first.weight, unclipped.first.weight) > 1e-5


def test_a_norm_below_the_bound_changes_nothing():
    _, _, norm = _clipped_step(1e9)
    one, _, _ = _clipped_step(1.01 * float(norm))
    other, _, _ = _clipped_step(1e9)
    assert same(weights_of(one), weights_of(other))


def test_clipping_holds_for_one_step_only():
    """The next step, with no clip of its own, moves the momentum by the whole gradient."""
    model, optimizer, _ = _clipped_step(1e-3)
    momentum = factors_of(optimizer)
    plain = build()
    plain.load_state_dict(model.state_dict())
    for module in (model, plain):
        module.zero_grad()  # the model's own, which does not reset the optimizer
        loss_of(module, 6).backward()
    optimizer.step()
    for name in MATRICES:
        M = next_momentum(momentum[name], plain.get_parameter(name).grad[None], beta=0.85, gamma=0.15)
        assert relative_error(dense(factors_of(optimizer)[name]), truncated(M, RANK)) < 1e-10


def test_clipping_twice_clips_to_the_smaller_bound():
    """Once for the log, once for good: the second call must see the gradient that the first has left."""
    _, _, norm = _clipped_step(1e9)
    once, _, _ = _clipped_step(0.25 * float(norm))
    model = build()
    optimizer = optimizer_of(model, adamw_eps=1e-3)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    loss_of(model, 5).backward()
    assert float(optimizer.clip_grad_norm_(0.5 * float(norm))) == pytest.approx(float(norm))
    assert float(optimizer.clip_grad_norm_(0.25 * float(norm))) == pytest.approx(0.5 * float(norm), rel=1e-4)
    assert float(optimizer.clip_grad_norm_(math.inf)) == pytest.approx(0.25 * float(norm), rel=1e-4)
    optimizer.step()
    for name, expected in weights_of(once).items():
        assert relative_error(model.get_parameter(name), expected) < 1e-6


# ---------------------------------------------------------------------- NaN and Inf


@CAPTURE
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("started", [0, 3])
def test_a_gradient_that_is_not_finite_moves_no_matrix_and_is_counted(capture, value, started):
    model = build()
    optimizer = optimizer_of(model, capture=capture, adamw_lr=0.0)
    train(model, optimizer, range(started))
    before, state = weights_of(model), copy.deepcopy(optimizer.named_state_dict()["mofasgd"]["matrices"])
    optimizer.zero_grad()
    (loss_of(model, 7) * value).backward()
    optimizer.step()
    after = weights_of(model)
    assert all(torch.equal(after[name], before[name]) for name in MATRICES)
    for name, factors in optimizer.named_state_dict()["mofasgd"]["matrices"].items():
        assert same(factors, state[name])
    assert (optimizer.matrices.steps, optimizer.matrices.skipped) == (started, 1)

    # and the run goes on as if that step had not been; AdamW's own moments, which it has spoilt, aside
    optimizer.adamw.state.clear()
    for name, param in model.named_parameters():
        param.data.copy_(before[name])
    train(model, optimizer, range(20, 22))
    assert optimizer.matrices.steps == started + 2
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(model.first.weight, before["first.weight"])


@pytest.mark.parametrize("norm, factor", [(math.nan, 0.0), (math.inf, 0.0), (4.0, 0.25), (0.5, 1.0)])
def test_the_clipping_factor_is_a_number_for_every_norm(norm, factor):
    assert clip_factor(norm, 1.0) == pytest.approx(factor, abs=1e-6)
    assert float(clip_factor(torch.tensor(norm), 1.0)) == pytest.approx(factor, abs=1e-6)


def test_a_norm_that_is_not_finite_is_reported():
    model = build()
    optimizer = optimizer_of(model)
    (loss_of(model, 0) * math.nan).backward()
    assert not torch.isfinite(optimizer.clip_grad_norm_(1.0))


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float64, {}),
        (torch.float32, {"update_rule": "inverse_sigma"}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.float32, {"capture": "hook", "weight_decay": 0.1}),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(at, dtype, options):
    """Through a file that holds nothing but tensors and numbers."""
    whole = build(dtype)
    optimizer = optimizer_of(whole, **options)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    saved = None
    for step in range(8):
        if step == at:
            saved = io.BytesIO()
            state = {"model": whole.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "scheduler": scheduler.state_dict()}, saved)
        train(whole, optimizer, [step])
        scheduler.step()

    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    resumed = build(dtype, seed=1)
    resumed_optimizer = optimizer_of(resumed, **options)
    resumed_scheduler = LambdaLR(resumed_optimizer, lambda step: 1 / (1 + step))
    train(resumed, resumed_optimizer, [77])  # whatever it did before is gone
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    resumed_scheduler.load_state_dict(state["scheduler"])
    for step in range(at, 8):
        train(resumed, resumed_optimizer, [step])
        resumed_scheduler.step()
    assert same(weights_of(resumed), weights_of(whole))
    for name, factors in resumed_optimizer.named_state_dict()["mofasgd"]["matrices"].items():
        assert same(factors, optimizer.named_state_dict()["mofasgd"]["matrices"][name])
    assert same(resumed_optimizer.matrices.masters.state_dict(), optimizer.matrices.masters.state_dict())


def test_a_state_is_a_copy():
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    state = optimizer.named_state_dict()["mofasgd"]["matrices"]["first.weight"]
    before = {key: value.clone() for key, value in state.items()}
    train(model, optimizer, range(2, 4))
    assert same(state, before)


def test_a_loaded_state_carries_the_learning_rate_and_decay():
    model = build()
    optimizer = optimizer_of(model)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.5
    optimizer.param_groups[0]["weight_decay"] = 0.25
    fresh = optimizer_of(build())
    fresh.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in fresh.param_groups] == [0.5, 0.5]
    assert fresh.param_groups[0]["weight_decay"] == 0.25


@pytest.mark.parametrize(
    "change, message",
    [
        ({"exclude": ["second"]}, "matrices are not this model's: 1 .*'second.weight'"),
        ({"include": ["embedding"]}, "matrices are not this model's: 1 .*'embedding.weight'"),
    ],
)
def test_the_state_of_another_run_is_refused(change, message):
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    other = optimizer_of(build(), **change)
    state = optimizer.named_state_dict()
    state["adamw"] = other.adamw.state_dict()  # whose own complaint would come first
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)


def test_a_state_of_another_shape_is_refused():
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    state = optimizer.named_state_dict()
    state["mofasgd"]["matrices"]["third.weight"]["V"] = torch.zeros(9, 4)
    with pytest.raises(ValueError, match=r"V of 'third.weight' is \(9, 4\), this model's would be \(8, 4\)"):
        optimizer_of(build()).load_state_dict(state)


@pytest.mark.parametrize(
    "before, after, line", [(4, 2, "truncated to the leading ones, which hold"), (2, 4, "grown by")]
)
def test_another_rank_resumes_the_same_momentum(before, after, line, capsys):
    model = build()
    optimizer = optimizer_of(model, rank=before)
    train(model, optimizer, range(3))
    state = optimizer.named_state_dict()
    resumed = build()
    resumed.load_state_dict(model.state_dict())
    other = optimizer_of(resumed, rank=after)
    capsys.readouterr()
    other.load_state_dict(state)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"rank {before}, this run's {after}" in said and line in said
    loaded = other.named_state_dict()["mofasgd"]["matrices"]
    for name, old in state["mofasgd"]["matrices"].items():
        new, k = loaded[name], min(before, after)
        assert new["U"].shape[1] == new["V"].shape[1] == len(new["sigma"]) == after
        assert same({key: new[key][..., :k] for key in new}, {key: old[key][..., :k] for key in old})
        assert not new["sigma"][k:].any()
    train(resumed, other, range(3, 6))
    for one in other.named_state_dict()["mofasgd"]["matrices"].values():
        assert one["sigma"][-1] > 0, "the added directions were never filled"
        for basis in (one["U"].double(), one["V"].double()):
            assert (basis.mT @ basis - torch.eye(after)).abs().max() < 1e-5


def test_another_rank_before_the_first_step(capsys):
    """There is no momentum to resize yet: the run starts as one of the new rank."""
    resumed, fresh = build(), build()
    other, wanted = optimizer_of(resumed, rank=2), optimizer_of(fresh, rank=2)
    state = optimizer_of(build(), rank=4).state_dict()
    capsys.readouterr()
    other.load_state_dict(state)
    assert capsys.readouterr().out == ""
    train(resumed, other, range(3))
    train(fresh, wanted, range(3))
    assert same(weights_of(resumed), weights_of(fresh))


def test_a_state_that_does_not_fit_changes_nothing():
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    state = optimizer.named_state_dict()
    other = optimizer_of(build())
    before = copy.deepcopy(other.named_state_dict())
    state["mofasgd"]["matrices"]["third.weight"]["V"] = torch.zeros(9, 4)
    with pytest.raises(ValueError, match="third.weight"):
        other.load_state_dict(state)
    after = other.named_state_dict()
    assert after["mofasgd"]["steps"] == 0 and not after["adamw"]["state"]
    assert after["matrix_groups"] == before["matrix_groups"]
    assert all(same(after["mofasgd"]["matrices"][name], one) for name, one in before["mofasgd"]["matrices"].items())


def test_a_state_of_a_later_format_is_refused():
    optimizer = optimizer_of(build())
    state = optimizer.named_state_dict()
    state["mofasgd"]["format"] = torch.tensor(99)
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        optimizer.load_state_dict(state)


def test_a_state_of_other_groups_is_refused():
    optimizer, model = optimizer_of(build()), build()
    parts = [{"params": [model.first.weight]}, {"params": [model.second.weight, model.third.weight, model.norm.weight]}]
    other = MoFaSGD(parts, model=model, rank=RANK)
    with pytest.raises(ValueError, match="has 1 matrix param groups, this run has 2"):
        other.load_state_dict(optimizer.named_state_dict())
    with pytest.raises(ValueError, match=r"groups of the state have \[3, 5\] parameters, and this run's \[1, 2, 1\]"):
        other.load_state_dict(optimizer.state_dict())


# ---------------------------------------------------------------------- 16 bits


def test_a_bf16_model_stays_bf16_and_its_factors_are_fp32():
    model = build(torch.bfloat16)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for factors in factors_of(optimizer).values():
        assert {part.dtype for part in factors} == {torch.float32}
        assert departure_from_orthonormal(factors.U) < 1e-5


def test_tiny_steps_move_bf16_weights_in_the_mean_only_if_rounding_is_stochastic():
    moved = {}
    for rounding in ("stochastic", "nearest"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
        nn.init.constant_(model[0].weight, 1.0)
        optimizer = MoFaSGD(model, rank=1, lr=1e-2, adamw_lr=1e-3, adjust_lr_fn="none", rounding=rounding)
        for _ in range(50):
            optimizer.zero_grad()
            model(torch.ones(1, 64).bfloat16()).sum().backward()  # G is all ones: W falls by lr / 64 everywhere
            optimizer.step()
        fall = 1 - model[0].weight.detach().double()
        moved[rounding] = float(fall.mean()) / (50 * 1e-2 / 64)
        if rounding == "stochastic":
            # 50 steps of 0.04 spacings: bits drawn anew each time would be a random walk, sqrt(50 * 0.04 * 0.96) = 1.4
            # spacings far; with the same bits again and again the same few weights would go every time, ten far.
            assert float(fall.std()) < 0.7 * 2**-8
    assert moved["stochastic"] == pytest.approx(1, abs=0.1)
    assert moved["nearest"] == 0


def test_matrices_of_one_shape_round_with_bits_of_their_own():
    model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2)).bfloat16()
    for linear in model:
        nn.init.constant_(linear.weight, 1.0)
    optimizer = MoFaSGD(model, rank=1, lr=1e-2, adamw_lr=1e-3, adjust_lr_fn="none")
    for linear in model:
        linear(torch.ones(1, 64).bfloat16()).sum().backward()
    optimizer.step()
    fallen = [linear.weight < 1 for linear in model]
    assert all(0.02 < float(fall.double().mean()) < 0.06 for fall in fallen)
    assert not torch.equal(*fallen)


def test_a_master_collects_what_bf16_cannot_hold():
    """With masters a bf16 run follows, to bf16's rounding, what its own gradients do to fp32 weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    nn.init.constant_(model[0].weight, 1.0)
    optimizer = MoFaSGD(model, rank=1, lr=1e-2, adamw_lr=1e-3, adjust_lr_fn="none", master_weights=True)
    for _ in range(50):
        optimizer.zero_grad()
        model(torch.ones(1, 64).bfloat16()).sum().backward()
        optimizer.step()
    expected = torch.full((64, 64), 1 - 50 * 1e-2 / 64).bfloat16()
    assert torch.equal(model[0].weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masters_are_kept_for_16_bit_weights_alone(dtype):
    model, twin = build(dtype), build(dtype)
    train(model, optimizer_of(model, master_weights=True), range(3))
    train(twin, optimizer_of(twin), range(3))
    assert same(weights_of(model), weights_of(twin))


def test_matrices_of_several_dtypes_train_together():
    model = build(torch.float32)
    model.first.bfloat16()

    class Cast(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.bfloat16()).float()

    model.first = Cast(model.first)
    losses = train(model, optimizer_of(model, lr=2e-2), range(80))
    assert losses[-1] < 0.5 * losses[0]
    assert model.first.inner.weight.dtype == torch.bfloat16 and model.third.weight.dtype == torch.float32


# ---------------------------------------------------------------------- the rest of the torch interface


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    results, calls = [], []
    for with_closure in (False, True):
        model = build()
        optimizer = optimizer_of(model)
        for step in range(3):

            def closure(step=step, model=model, optimizer=optimizer):
                calls.append(torch.is_grad_enabled())
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            if with_closure:
                loss = optimizer.step(closure)
                assert isinstance(loss, torch.Tensor) and float(loss.detach()) > 0
            else:
                train(model, optimizer, [step])
        results.append(weights_of(model))
    assert same(*results) and calls == [True] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_bits_and_another_one_others(dtype):
    results = []
    for seed, disturbance in ((3, 0), (3, 1), (4, 0)):
        model = build(dtype)
        optimizer = optimizer_of(model, seed=seed)
        torch.manual_seed(disturbance)
        train(model, optimizer, range(4))
        results.append(weights_of(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_training_does_not_move_the_global_random_state():
    model = build()
    before = torch.get_rng_state()
    train(model, optimizer_of(model), range(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_parameters_stay_as_they_are():
    model = build()
    frozen = [model.second.weight, model.norm.bias]
    for param in frozen:
        param.requires_grad_(False)
    before = [param.clone() for param in frozen]
    train(model, optimizer_of(model, weight_decay=0.1), range(3))
    assert all(map(torch.equal, frozen, before))


def test_detach_gives_the_model_back():
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    optimizer.matrices.detach()
    model.zero_grad()
    loss_of(model, 3).backward()
    assert all(param.grad is not None for param in model.parameters())
    assert not optimizer.matrices.sketches.any()


def test_a_matrix_that_is_not_contiguous_is_trained_or_refused_when_built():
    """Weights loaded from a transposed file are such; they must not fail in the middle of the first step."""
    model, twin = build(), build()
    model.first.weight = nn.Parameter(model.first.weight.detach().T.contiguous().T)
    assert not model.first.weight.is_contiguous()
    try:
        optimizer = optimizer_of(model)
    except OptionError as error:
        assert "first.weight" in str(error)
        return
    train(model, optimizer, range(3))
    train(twin, optimizer_of(twin), range(3))
    for name, expected in weights_of(twin).items():
        assert relative_error(model.get_parameter(name), expected) < 1e-10


def test_options_are_kept():
    options = optimizer_of(build(), beta=0.5).options
    assert options == Options(rank=RANK, beta=0.5, **RATE)


def test_the_best_rank_r_matrix_is_what_the_momentum_is():
    """With beta = 0 and a gradient that lies in the tangent space the momentum is the gradient's own truncation."""
    model = build()
    optimizer = optimizer_of(model, beta=0.0, lr=1e-12, adamw_lr=0.0)
    for _ in range(60):  # the same gradient again and again: subspace iteration
        train(model, optimizer, [0])
    plain = build()
    loss_of(plain, 0).backward()
    for name in MATRICES:
        best = truncated(plain.get_parameter(name).grad, RANK)
        assert relative_error(dense(factors_of(optimizer)[name])[0], best) < 1e-3


@pytest.mark.parametrize("chosen", ["highest", "high"])
def test_the_factors_are_updated_in_full_fp32_whatever_the_script_has_chosen(chosen, monkeypatch):
    """TF32 has three digits; a script that switches it on means it for the model."""
    seen = []

    def spy(*args, **kwargs):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return update_many(*args, **kwargs)

    monkeypatch.setattr(mofasgd_rule, "update_many", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(chosen)
    try:
        model = build()
        train(model, optimizer_of(model), range(2))
        assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen and set(seen) == {"ieee"}
