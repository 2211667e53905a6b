"""GaLore by sketches: the dense equations to float64's rounding, the baseline's given the same bases, and its state."""

import copy
import dataclasses
import logging
import math

import pytest
import torch
from torch import nn

from ds_mofa import GaLore, MoFaSGD, OptionError
from ds_mofa.optimizers.gradient import SketchedGradient
from ds_mofa.options import GaLoreOptions, GaLoreRuleOptions, MoFaSGDRuleOptions, OptimizerOptions
from ds_mofa.rules import galore as rule
from ds_mofa.rules.galore import basis_of
from ds_mofa.step import step
from experiments.baselines import galore as baseline
from experiments.baselines import state_bytes
from experiments.baselines.orientation import wide
from tests.galore_reference import GaLoreReference
from tests.live_bytes import LiveBytes
from tests.unit.dense_reference import departure_from_orthonormal, relative_error

SETTINGS = {"lr": 1e-2, "rank": 3, "alpha": 0.3, "betas": (0.8, 0.95), "eps": 1e-6, "adamw_eps": 1e-6}
MATRICES = ["widen.weight", "narrow.weight", "square.weight", "out.weight"]


class Product(nn.Linear):
    def forward(self, x):
        return x @ self.weight


class Model(nn.Module):
    """A tall, a wide and a square matrix, one whose hook captures it, and norms and biases for AdamW."""

    def __init__(self):
        super().__init__()
        self.widen, self.narrow = nn.Linear(8, 13), nn.Linear(13, 8, bias=False)
        self.square = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.out = Product(11, 8, bias=False)
        nn.init.normal_(self.out.weight, std=1 / 3)

    def forward(self, x, target):
        x = self.square(torch.tanh(self.narrow(torch.tanh(self.widen(x)))))
        return (self.out(self.norm(x)) - target).square().mean()


def build(dtype=torch.float64):
    torch.manual_seed(0)
    return Model().to(dtype)


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(20, 8, generator=generator).to(dtype), torch.randn(20, 11, generator=generator).to(dtype)


def train(model, optimizer, steps, micro_batches=1, clip=None):
    losses, norms = [], []
    for number in steps:
        x, target = batch(number, model.norm.weight.dtype)
        for part in zip(x.chunk(micro_batches), target.chunk(micro_batches)):
            loss = model(*part) / micro_batches
            loss.backward()
            losses.append(float(loss.detach()))
        if clip is not None:
            norms.append(float(optimizer.clip_grad_norm_(clip)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def weights_of(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


# ---------------------------------------------------------------------- the equations


@pytest.mark.parametrize("capture", ["linear", "hook"])
@pytest.mark.parametrize("refresh_every", [1, 2, 3, 100])
@pytest.mark.parametrize(("micro_batches", "clip"), [(1, None), (4, 0.05)])
def test_a_run_is_the_dense_one(capture, refresh_every, micro_batches, clip):
    model, settings = build(), {**SETTINGS, "refresh_every": refresh_every}
    optimizer = GaLore(model, weight_decay=0.1, capture=capture, adamw_betas=(0.9, 0.999), **settings)
    reference = GaLoreReference(
        build(), [name for name, p in model.named_parameters() if name in MATRICES],
        weight_decay=0.1, clip=clip or 0.0, adamw_lr=lambda step: 1e-2, **settings,
    )  # fmt: skip
    start = weights_of(model)
    _, norms = train(model, optimizer, range(8), micro_batches, clip)
    for number in range(8):
        reference.step(batch(number))
        if norms:
            assert norms[number] == pytest.approx(reference.norm, rel=1e-6)  # fp32, for AdamW's
    for name, expected in reference.weights().items():
        assert relative_error(model.get_parameter(name), expected) < (1e-6 if clip else 1e-9), name
        assert relative_error(start[name], expected) > 1e-3 or name == "norm.bias"
    if clip:
        assert min(norms) > 2 * clip


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_given_the_bases_it_is_the_peer(shape, refresh_every, monkeypatch):
    """The baseline's own optimizer on the whole gradients, whose SVD hands out the bases that ours has in force."""
    m, n = shape
    torch.manual_seed(0)
    layer = nn.Linear(n, m, bias=False).double()
    ours = GaLore(nn.Sequential(layer), weight_decay=0.2, refresh_every=refresh_every, **SETTINGS)
    given = []
    monkeypatch.setattr(baseline, "leading_subspace", lambda G, rank: given[-1])
    settings = {key: SETTINGS[key] for key in ("rank", "alpha", "betas", "eps")}
    weight = nn.Parameter(layer.weight.detach().clone())
    theirs = baseline.GaLore([{"params": [weight], "lr": 1e-2, "weight_decay": 0.2}], refresh_every=1, **settings)
    for number in range(8):
        x, dy = torch.randn(12, n).double(), torch.randn(12, m).double()
        if number > 0:
            given.append(ours.named_state_dict()["mofasgd"]["matrices"]["0.weight"]["P"])
        (layer(x) * dy).sum().backward()
        ours.step()
        if number == 0:  # it only looks, and decays
            assert torch.allclose(layer.weight, weight * (1 - 1e-2 * 0.2), rtol=1e-14)
            weight.data.copy_(layer.weight.detach())
            continue
        weight.grad = dy.T @ x
        theirs.step()
        assert relative_error(layer.weight, weight) < 1e-12
    assert len({float(P.sum()) for P in given}) == (7 if refresh_every == 1 else 3)


def test_a_basis_holds_most_of_the_gradient_that_it_was_taken_from():
    """Of a gradient with a spectrum that decays, nearly what the best basis holds; of rank r, all."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(5, size, 20).double()).Q for size in (40, 90))
    G = U * 0.7 ** torch.arange(20) @ V.mT
    omega = torch.randn(5, 90, 8).double()
    held, best = ((P.mT @ G).norm() / G.norm() for P in (basis_of(G @ omega), U[..., :8]))
    assert 0.97 * best < held < best
    low = U[..., :8] @ V[..., :8].mT
    P = basis_of(low @ omega)
    assert relative_error(P @ (P.mT @ low), low) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["generic", "square", "rank one", "zero"])
def test_a_basis_is_the_orthonormal_left_singular_vectors(kind, dtype):
    torch.manual_seed(0)
    Y = torch.randn(3, 4 if kind == "square" else 30, 4, dtype=dtype)
    if kind == "rank one":
        Y = Y[..., :1] @ torch.randn(3, 1, 4, dtype=dtype)
    if kind == "zero":
        Y.zero_()
    P = basis_of(Y)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert P.dtype == dtype and departure_from_orthonormal(P) < tolerance
    largest = P.gather(-2, P.abs().argmax(dim=-2, keepdim=True))
    assert (largest > 0).all()
    live = {"rank one": 1, "zero": 0}.get(kind, 4)
    U = torch.linalg.svd(Y, full_matrices=False).U[..., :live]
    for column in range(live):
        overlap = (P[..., column] * U[..., column]).sum(-1).abs()
        assert torch.allclose(overlap, torch.ones_like(overlap), atol=10 * tolerance)


def test_a_decomposition_that_fails_leaves_the_subspace_and_says_so(monkeypatch, caplog):
    torch.manual_seed(0)
    Y = torch.randn(2, 20, 4)
    wanted = basis_of(Y)

    def fail(*_, **__):
        raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")

    monkeypatch.setattr(rule, "leading_svd", fail)
    with caplog.at_level(logging.WARNING, "ds_mofa"):
        P = basis_of(Y)
    assert "failed to converge" in caplog.text
    assert departure_from_orthonormal(P) < 1e-5 and not torch.allclose(P, wanted, atol=1e-2)
    assert relative_error(P @ P.mT, wanted @ wanted.mT) < 1e-5


def test_the_loss_falls():
    model = build(torch.float32)
    losses, _ = train(model, GaLore(model, **{**SETTINGS, "lr": 3e-2}, refresh_every=10), [0] * 150)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_the_dense_run(dtype):
    model = build(dtype)
    settings = {**SETTINGS, "refresh_every": 3, "eps": 1e-2, "adamw_eps": 1e-2}
    train(model, GaLore(model, adamw_betas=(0.9, 0.999), **settings), range(8))
    names = [name for name, _ in model.named_parameters() if name in MATRICES]
    reference = GaLoreReference(build(), names, adamw_lr=lambda step: 1e-2, **settings)
    for number in range(8):
        reference.step(batch(number))
    for name in MATRICES:
        error = relative_error(model.get_parameter(name).double(), reference.weights()[name])
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), name


# ---------------------------------------------------------------------- what lives, and what is skipped


def test_no_gradient_lives_and_the_state_is_as_large_as_it_says():
    model = build(torch.float32)
    optimizer = GaLore(model, **SETTINGS, refresh_every=1)
    for number in range(3):
        model(*batch(number, torch.float32)).backward()
        assert all(isinstance(model.get_parameter(name).grad, SketchedGradient) for name in MATRICES)  # without memory
        optimizer.step()
    state = optimizer.named_state_dict()["mofasgd"]["matrices"]
    for name in MATRICES:
        s, l = sorted(model.get_parameter(name).shape)
        assert sum(value.nbytes for value in state[name].values()) == 4 * 3 * (s + 2 * l) + 4
    held = optimizer.matrices.factors.nbytes
    assert sum(value.nbytes for one in state.values() for value in one.values()) <= held
    assert state_bytes(optimizer) >= held


def test_a_step_s_update_stays_within_the_bound(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(96, 96 if i < 5 else 64, bias=False) for i in range(6)), nn.LayerNorm(64))
    optimizer = GaLore(model, lr=1e-2, rank=8, refresh_every=1, update_bytes=200_000)
    matrices = optimizer.matrices
    assert 1 < len(matrices.owner.sub_batches) < 6
    monkeypatch.setattr(step, "write_wherever", lambda *_, **__: None)
    held = sum(view.numel() * 4 for block in matrices.layout.blocks for view in block.views(matrices.working)[:1])
    for _ in range(3):
        matrices.sketches.normal_()
        matrices.reduce()
        with LiveBytes() as live:
            matrices.update(optimizer.matrix_groups)
    assert 40_000 < live.peak <= 200_000 + held  # the old bases, besides


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_in_what_is_used_skips_the_step(steps, side):
    """In both sketches where a basis is taken, in R alone elsewhere: the other is not looked at."""
    model = build(torch.float32)
    optimizer = GaLore(model, **SETTINGS, refresh_every=2)
    train(model, optimizer, range(steps))
    before, state = weights_of(model), copy.deepcopy(optimizer.named_state_dict()["mofasgd"])
    model(*batch(5, torch.float32)).backward()
    matrices = optimizer.matrices
    index = [matrix.name for matrix in matrices.members].index("widen.weight")  # tall: Y is R, Z becomes the basis
    matrices.layout.views(matrices.sketches, index)[side][0, 0] = math.nan
    optimizer.step()
    used = side == 0 or steps % 2 == 0
    assert matrices.skipped == used
    same = [torch.equal(model.get_parameter(name), value) for name, value in before.items()]
    assert all(same) == used
    if used:
        after = optimizer.named_state_dict()["mofasgd"]["matrices"]
        assert all(
            torch.equal(after[name][key], value[key]) for name, value in state["matrices"].items() for key in value
        )
    assert all(torch.isfinite(param).all() for param in model.parameters())


def test_a_matrix_without_a_gradient_is_left_alone():
    model = build()
    optimizer = GaLore(model, **SETTINGS, refresh_every=2)
    before = weights_of(model)
    for _ in range(5):
        optimizer.step()
    for name in MATRICES:
        assert torch.equal(model.get_parameter(name), before[name])


# ---------------------------------------------------------------------- options and state


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"master_weights": True, "dtype": torch.bfloat16}], ids=["fp32", "masters"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(at, options):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    model = build(dtype)
    optimizer = GaLore(model, refresh_every=3, **SETTINGS, **options)
    train(model, optimizer, range(at))
    resumed = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.named_state_dict()})
    train(model, optimizer, range(at, 7))
    other = build(dtype)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1)
    other.load_state_dict(resumed["model"])
    second = GaLore(other, refresh_every=3, **SETTINGS, **options)
    second.load_state_dict(resumed["optimizer"])
    train(other, second, range(at, 7))
    for name, value in weights_of(model).items():
        assert torch.equal(value, other.get_parameter(name)), name


def test_a_state_that_does_not_count_gradients_is_taken_as_one_of_every_step():
    """As states were saved before a matrix could rest."""
    ends = []
    for counted in (True, False):
        model = build()
        optimizer = GaLore(model, **SETTINGS)
        train(model, optimizer, range(3))
        state = copy.deepcopy(optimizer.named_state_dict())
        if not counted:
            for one in state["mofasgd"]["matrices"].values():
                assert float(one.pop("gradients")) == 3
        optimizer.load_state_dict(state)
        train(model, optimizer, range(3, 6))
        ends.append(weights_of(model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_another_rank_and_another_optimizer_s_state_are_refused_with_the_way_out():
    model = build()
    optimizer = GaLore(model, **SETTINGS)
    train(model, optimizer, range(2))
    state = optimizer.named_state_dict()
    other = GaLore(build(), **{**SETTINGS, "rank": 2})
    with pytest.raises(ValueError, match='bases have rank 3, this run\'s 2.*Set "rank" to 3'):
        other.load_state_dict(state)
    assert other.matrices.steps == 0
    theirs = MoFaSGD(build(), lr=1e-2, rank=3, adjust_lr_fn="adamw")
    with pytest.raises(ValueError, match="was saved by GaLore, this run's optimizer is MoFaSGD.*load_optimizer_states"):
        theirs.load_state_dict(state)
    with pytest.raises(ValueError, match="was saved by MoFaSGD, this run's optimizer is GaLore"):
        optimizer.load_state_dict(theirs.named_state_dict())
    with pytest.raises(ValueError, match="has step, U, V, sigma, and lacks 'P' of GaLore: it is another optimizer's"):
        optimizer.load_state_dict(theirs.state_dict())


def test_adamw_takes_after_it_unless_told_otherwise():
    options = GaLore(build(), lr=1e-3, betas=(0.8, 0.9), eps=1e-5).options
    assert (options.adamw_betas, options.adamw_eps, options.adamw_lr_ratio) == ((0.8, 0.9), 1e-5, 1.0)
    options = GaLore(build(), lr=1e-3, adamw_betas=(0.7, 0.8), adamw_eps=1e-4, adamw_lr=1e-4).options
    assert (options.adamw_betas, options.adamw_eps) == ((0.7, 0.8), 1e-4)
    assert options.adamw_lr_ratio == pytest.approx(0.1)
    assert options.betas == (0.9, 0.999)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_every": 0}, "refresh_every=0 must be a whole number >= 1"),
        ({"alpha": 0.0}, "alpha=0.0 must be > 0"),
        ({"eps": 0}, "eps=0 must be > 0"),
        ({"betas": 0.9}, "betas=0.9 must be two numbers"),
        ({"betas": (0.9, 1.0)}, "betas=1.0 must be >= 0 and < 1"),
        ({"beta": 0.85}, "unknown option 'beta' of GaLore; did you mean 'betas'"),
        ({"update_rule": "spectral"}, "unknown option 'update_rule' of GaLore"),
        ({"rank": 99}, "GaLore found no matrix to train.*Set rank to at most 8"),
    ],
)
def test_what_cannot_be_right_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        GaLore(build(), lr=1e-3, **options)


def test_its_options_are_its_rule_s_and_what_every_optimizer_takes():
    own = {field.name for field in dataclasses.fields(GaLoreRuleOptions)}
    assert {*GaLoreOptions.names()} == own | {*OptimizerOptions.names()}
    assert not own & {field.name for field in dataclasses.fields(MoFaSGDRuleOptions)}


def test_it_says_what_it_trains():
    optimizer = GaLore(build(), lr=1e-3, rank=3)
    assert "4 matrices on GaLore" in optimizer.split.summary() and "MoFaSGD" not in optimizer.split.summary()


def test_wide_is_the_peers():
    """The rule's short side is the one that the baseline projects."""
    for shape in ((3, 5), (5, 3), (4, 4)):
        short, _ = rule._sides(shape, *(torch.empty(size) for size in shape))
        assert len(short) == len(wide(torch.empty(shape)))
