"""The baselines against dense transcriptions of their papers in float64, against torch's own optimizers where they must
agree, and as a comparison uses them: built, resumed, counted."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_mofa import MoFaSGD
from experiments import baselines
from experiments.baselines.baseline import Baseline
from experiments.baselines.fira import Fira
from experiments.baselines.galore import GaLore
from experiments.baselines.gum import GUM, is_sampled
from experiments.baselines.mlorc import MLorc, mended, randomized_svd
from experiments.baselines.newton_schulz import orthogonalized
from experiments.baselines.projected_gradient import ProjectedGradient
from experiments.baselines.randomness import keyed_generator
from experiments.baselines.restarts import balanced, lora_pairs, refactorize
from experiments.baselines.so import SO
from tests.unit.dense_reference import random_orthonormal, relative_error, truncated

SHAPES = pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)], ids=["wide", "tall", "square"])
LR, DECAY, BETAS, EPS = 0.1, 0.2, (0.8, 0.95), 1e-3


# ---------------------------------------------------------------------- running an optimizer on given gradients


def gradients(shape, count, seed=0):
    """Of very different sizes: a limiter has to act in some steps and to rest in others."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1.0, 3.0, 0.2, 1.0, 1.005, 5.0, 0.01, 2.0, 2.0, 1.0, 0.5, 4.0]
    return [sizes[t % 12] * torch.randn(shape, generator=generator, dtype=torch.float64) for t in range(count)]


def start(shape, count=1):
    generator = torch.Generator().manual_seed(99)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for _ in range(count)]


def walk(method, shape, grads, lr=LR, decay=DECAY, **settings):
    """The weights after each step of ``method`` on one matrix."""
    [param] = start(shape)
    optimizer = method([{"params": [param], "lr": lr, "weight_decay": decay}], **settings)
    weights = []
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        weights.append(param.detach().clone())
    return weights


def assert_same_walk(weights, expected, tolerance=1e-10):
    assert len(weights) == len(expected)
    for t, (value, reference) in enumerate(zip(weights, expected)):
        assert relative_error(value, reference) < tolerance, f"step {t + 1}"


def decayed(W, D, lr=LR, decay=DECAY):
    return W - lr * decay * W - lr * D


class Moments:
    """Adam for an array of any shape, with its own books."""

    def __init__(self, betas=BETAS, eps=EPS):
        self.betas, self.eps, self.t, self.m, self.v = betas, eps, 0, 0.0, 0.0

    def __call__(self, G):
        b1, b2 = self.betas
        self.t += 1
        self.m, self.v = b1 * self.m + (1 - b1) * G, b2 * self.v + (1 - b2) * G**2
        return (self.m / (1 - b1**self.t)) / (torch.sqrt(self.v / (1 - b2**self.t)) + self.eps)


def signed(Q):
    """Each column with its largest entry positive."""
    for column in Q.mT:
        column *= 1 if column[column.abs().argmax()] > 0 else -1
    return Q


def projectors(G, r):
    """(left, right) of the two-sided form R = left^T G right: the paper projects the smaller dimension."""
    m, n = G.shape
    U, _, Vt = torch.linalg.svd(G)
    one = torch.eye(max(m, n), dtype=G.dtype)
    return (one[:m, :m], signed(Vt[:r].mT.clone())) if m >= n else (signed(U[:, :r].clone()), one[:n, :n])


# ---------------------------------------------------------------------- GaLore and Fira


@SHAPES
def test_galore_is_adam_on_the_projected_gradient(shape):
    grads = gradients(shape, 8)
    settings = dict(rank=2, refresh_every=3, alpha=0.3, betas=BETAS, eps=EPS)
    W, adam, expected = start(shape)[0].detach(), Moments(), []
    for t, G in enumerate(grads):
        if t in (0, 3, 6):
            left, right = projectors(G, 2)
        N = adam(left.mT @ G @ right)
        W = decayed(W, 0.3 * left @ N @ right.mT)
        expected.append(W)
    assert_same_walk(walk(GaLore, shape, grads, **settings), expected)


@SHAPES
def test_galore_is_adam_where_the_singular_vectors_are_the_axes(shape):
    """Gradients with orthogonal rows of falling norms (columns, where tall): projecting chooses rows, turns nothing."""
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    grads = []
    for _ in range(6):
        rows = torch.linspace(3, 1, min(m, n), dtype=torch.float64)[:, None]
        G = rows * random_orthonormal(max(m, n), min(m, n), generator).mT
        grads.append(G if m < n else G.mT)
    adam = walk(torch.optim.AdamW, shape, grads, decay=0.0, betas=BETAS, eps=EPS)
    every = walk(GaLore, shape, grads, decay=0.0, rank=min(m, n), refresh_every=2, alpha=1.0, betas=BETAS, eps=EPS)
    assert_same_walk(every, adam)
    some = walk(GaLore, shape, grads, decay=0.0, rank=2, refresh_every=2, alpha=1.0, betas=BETAS, eps=EPS)
    began = start(shape)[0].detach()
    for value, reference in zip(some, adam):
        chosen = (slice(0, 2), slice(None)) if m < n else (slice(None), slice(0, 2))
        expected = began.clone()
        expected[chosen] = reference[chosen]
        assert relative_error(value, expected) < 1e-10


@SHAPES
def test_fira_adds_the_scaled_and_limited_residual(shape):
    m, n = shape
    grads = gradients(shape, 12)
    settings = dict(rank=2, refresh_every=5, alpha=0.7, gamma=1.3, betas=BETAS, eps=EPS)
    W, adam, last, expected, limited = start(shape)[0].detach(), Moments(), None, [], []
    for t, G in enumerate(grads):
        if t % 5 == 0:
            left, right = projectors(G, 2)
        R = left.mT @ G @ right
        N = adam(R)
        S = G - left @ R @ right.mT
        for j in range(max(m, n)):
            at = (slice(None), j) if m < n else (j, slice(None))
            S[at] *= N[at].norm() / R[at].norm()
        limited.append(last is not None and float(S.norm()) > 1.3 * last)
        if limited[-1]:
            S *= 1.3 * last / S.norm()
        last = float(S.norm())
        W = decayed(W, 0.7 * left @ N @ right.mT + S)
        expected.append(W)
    assert 2 <= sum(limited) <= 9  # the limiter acts, and rests
    assert_same_walk(walk(Fira, shape, grads, **settings), expected)


@SHAPES
def test_fira_is_galore_where_the_subspace_holds_everything(shape):
    grads = gradients(shape, 7)
    settings = dict(rank=min(shape), refresh_every=3, alpha=1.0, betas=BETAS, eps=EPS)
    assert_same_walk(walk(Fira, shape, grads, **settings), walk(GaLore, shape, grads, **settings))


def test_fira_takes_up_again_after_a_gradient_of_zero():
    G = gradients((5, 9), 1)[0]
    weights = walk(Fira, (5, 9), [G, 0 * G, G, G], decay=0.0, rank=2, refresh_every=100, eps=EPS)
    assert all(torch.isfinite(W).all() for W in weights)
    P = projectors(G, 2)[0]
    moved = weights[2] - weights[1]
    assert float((moved - P @ P.mT @ moved).norm()) > 0.1 * float(moved.norm())  # outside the subspace as well


# ---------------------------------------------------------------------- MLorc


@SHAPES
def test_mlorc_compresses_the_moments_between_the_steps(shape):
    m, n = shape
    grads = [G**3 for G in gradients(shape, 12)]  # few large entries: what a truncated SVD makes negative
    settings = dict(rank=2, oversampling=1, power_iterations=1, betas=BETAS, eps=EPS, seed=7)
    tall = m >= n  # the test matrices are drawn for the gradient seen wide
    W, first, second, expected, negatives = start(shape)[0].detach(), 0.0, 0.0, [], 0
    for t, G in enumerate(grads, start=1):
        if t > 1:
            below = second < 0
            negatives += int(below.sum())
            second = torch.where(below, second[below].abs().mean() if below.any() else 0.0, second)
        first, second = 0.8 * first + 0.2 * G, 0.95 * second + 0.05 * G**2
        N = first / (1 - 0.8**t) / (torch.sqrt(second / (1 - 0.95**t)) + EPS)
        W = decayed(W, N)
        expected.append(W)
        generator = keyed_generator(7, t, 0, G.device)
        first, second = (_halko(M.mT, generator).mT if tall else _halko(M, generator) for M in (first, second))
    assert negatives > 0  # the mending is used
    assert_same_walk(walk(MLorc, shape, grads, **settings), expected)


def _halko(M, generator):
    """Rank 2 by 3 test vectors and one power iteration, as projections: no factor is formed."""
    omega = torch.randn(M.shape[1], 3, generator=generator, dtype=torch.float64)
    Q = torch.linalg.svd(M @ M.mT @ M @ omega, full_matrices=False).U
    return truncated(Q @ Q.mT @ M, 2)


@SHAPES
def test_mlorc_is_adamw_at_full_rank(shape):
    grads = gradients(shape, 8)
    lossless = walk(MLorc, shape, grads, rank=min(shape), betas=BETAS, eps=EPS)
    assert_same_walk(lossless, walk(torch.optim.AdamW, shape, grads, betas=BETAS, eps=EPS), 1e-8)


@SHAPES
def test_mlorc_is_adamw_where_the_moments_have_its_rank(shape):
    [G] = gradients(shape, 1)
    G = G[:, :1] @ G[:1]  # its square has rank 1 as well
    grads = [scale * G for scale in (1.0, -0.5, 3.0, 0.1, 1.0)]
    lossless = walk(MLorc, shape, grads, rank=1, betas=BETAS, eps=EPS)
    assert_same_walk(lossless, walk(torch.optim.AdamW, shape, grads, betas=BETAS, eps=EPS), 1e-8)


def test_negative_entries_of_the_second_moment_become_their_mean_magnitude():
    v = torch.tensor([[1.0, -0.5, 0.0], [-1.5, 2.0, 3.0]])
    assert torch.equal(mended(v), torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 3.0]]))
    assert torch.equal(mended(v.abs()), v.abs())


def test_randomized_svd_is_close_to_the_best_approximation():
    generator = torch.Generator().manual_seed(0)
    spectrum = 0.7 ** torch.arange(20, dtype=torch.float64)
    A = random_orthonormal(20, 20, generator) * spectrum @ random_orthonormal(30, 20, generator).mT
    best = float(spectrum[6:].norm())
    excess = []
    for oversampling, power_iterations in ((0, 0), (0, 1), (4, 1), (4, 2)):
        errors = []
        for _ in range(30):
            U, sigma, V = randomized_svd(A, 6, oversampling, power_iterations, generator=generator)
            assert U.shape == (20, 6) and sigma.shape == (6,) and V.shape == (30, 6)
            errors.append(float((A - U * sigma @ V.mT).norm()) / best)
        excess.append(sum(errors) / len(errors) - 1)
    assert 1 < excess[0] < 2 and excess[1] < 0.2 and excess[2] < 1e-3 and -1e-12 < excess[3] < 1e-6


# ---------------------------------------------------------------------- GUM and Muon


def _muon_polynomial(M, steps):
    """Newton-Schulz on the singular values alone."""
    U, s, Vt = torch.linalg.svd(M, full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U * s @ Vt


def test_newton_schulz_acts_on_singular_values_alone():
    M = gradients((4, 7), 1)[0]
    assert relative_error(orthogonalized(M), _muon_polynomial(M, 5)) < 1e-12
    assert relative_error(orthogonalized(1e-6 * M), orthogonalized(M)) < 1e-12
    s = torch.linalg.svdvals(orthogonalized(M))
    assert 0.6 < s.min() and s.max() < 1.3
    assert torch.equal(orthogonalized(0 * M), 0 * M)


@SHAPES
def test_gum_steps_in_the_subspace_or_outside_it(shape):
    m, n = shape
    q, period, count = 0.5, 3, 24
    grads = gradients(shape, count)
    settings = dict(rank=2, q=q, period=period, momentum=0.6, ns_steps=3, adjust_lr_fn="original", seed=1)
    factor = math.sqrt(max(1.0, m / n))
    W, expected, sampled = start(shape)[0].detach(), [], []
    for t, G in enumerate(grads):
        if t % period == 0:
            left, right = projectors(G, 2)
            full = is_sampled(q, 1, t // period, 0)
            sampled.append(full)
            M = 0.0
        inside = left @ left.mT @ G @ right @ right.mT
        M = 0.6 * M + ((G - inside) / q if full else inside / (1 - q))
        W = decayed(W, factor * _muon_polynomial(M, 3))
        expected.append(W)
    assert 2 <= sum(sampled) <= len(sampled) - 2
    assert_same_walk(walk(GUM, shape, grads, **settings), expected, 1e-9)


@SHAPES
def test_gum_is_muon_where_the_subspace_holds_everything(shape):
    """Without sampling and within one period; torch iterates in bfloat16."""
    grads = gradients(shape, 6)
    gum = walk(GUM, shape, grads, rank=min(shape), q=0.0, period=100, momentum=0.9)
    muon = walk(
        torch.optim.Muon, shape, grads, momentum=0.9, nesterov=False, ns_steps=5, adjust_lr_fn="match_rms_adamw"
    )
    before = start(shape)[0].detach()
    for value, reference in zip(gum, muon):
        assert relative_error(value - before, reference - before) < 0.05


def test_gum_estimates_the_gradient_without_bias():
    """Many matrices with one gradient: what they add to their momenta has the gradient as its mean."""
    count, q = 4000, 0.25
    for shape in ((3, 5), (5, 3)):
        [G] = gradients(shape, 1)
        params = start(shape, count)
        optimizer = GUM([{"params": params}], rank=1, q=q, seed=3)
        for param in params:
            param.grad = G
        optimizer.step()
        total, seen = torch.zeros_like(G), set()
        for state in optimizer.state.values():
            R, P = state["R"], state["P"]
            seen.add(R.shape)
            estimate = R if R.shape[0] == 3 else P @ R
            total += estimate if shape == (3, 5) else estimate.mT
        assert seen == {(1, 5), (3, 5)}
        # The share that was sampled is q to a standard error of sqrt(q (1 - q) / 4000) = 0.007.
        assert relative_error(total / count, G) < 4 * 0.007 / q


def test_gum_samples_each_matrix_and_period_by_itself():
    for q in (0.0, 0.1, 0.5):
        draws = torch.tensor(
            [[[is_sampled(q, seed, t, i) for i in range(20)] for t in range(20)] for seed in range(20)]
        ).double()
        assert abs(float(draws.mean()) - q) <= 4 * math.sqrt(q * (1 - q) / draws.numel())
        if q:
            centred = draws - q
            for pairs in (
                centred[1:] * centred[:-1],
                centred[:, 1:] * centred[:, :-1],
                centred[..., 1:] * centred[..., :-1],
            ):
                assert abs(float(pairs.mean())) < 5 * q * (1 - q) / math.sqrt(pairs.numel())


# ---------------------------------------------------------------------- SO


@SHAPES
def test_so_is_adam_on_a_random_and_an_important_support(shape):
    grads, k = gradients(shape, 9), int(0.2 * shape[0] * shape[1])
    settings = dict(density=0.2, refresh_every=2, betas=(0.4, 0.95), eps=EPS, seed=5)
    m, n = shape
    W, books, expected, joined = start(shape)[0].detach().clone(), {}, [], 0
    for t, G in enumerate(grads, start=1):
        if t % 2 == 1:
            generator = keyed_generator(5, t, 0, G.device)
            drawn = torch.randperm(m * n, generator=generator)[:k].tolist()
            # the order of the entries is that of the gradient seen wide
            drawn = [(i // n, i % n) if m < n else (i % m, i // m) for i in drawn]
        W -= LR * DECAY * W
        joined += sum(1 for entry in drawn if entry not in books) if t > 1 else 0
        for entry in {*drawn, *books}:
            g = float(G[entry]) if entry in drawn else 0.0
            first, second = books.get(entry, (0.0, 0.0))
            first, second = 0.4 * first + 0.6 * g, 0.95 * second + 0.05 * g * g
            books[entry] = first, second
            W[entry] -= LR * first / (1 - 0.4**t) / (math.sqrt(second / (1 - 0.95**t)) + EPS)
        books = dict(sorted(books.items(), key=lambda item: -abs(item[1][0]))[:k])
        expected.append(W.clone())
    assert joined > k  # the supports do change
    assert_same_walk(walk(SO, shape, grads, **settings), expected)


@SHAPES
def test_so_is_adamw_where_everything_is_in_the_support(shape):
    grads = gradients(shape, 6)
    dense = walk(SO, shape, grads, density=1.0, refresh_every=2, betas=BETAS, eps=EPS)
    assert_same_walk(dense, walk(torch.optim.AdamW, shape, grads, betas=BETAS, eps=EPS))


def test_so_draws_every_entry_alike():
    params = start((4, 5), 2000)
    optimizer = SO([{"params": params}], density=0.25, seed=1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    hits = torch.stack([state["S"] for state in optimizer.state.values()]).long().flatten().bincount(minlength=20)
    assert hits.sum() == 2000 * 5
    assert float((hits - 500).abs().max()) < 5 * math.sqrt(2000 * 0.25 * 0.75)


# ---------------------------------------------------------------------- restarts


def test_balanced_factors_have_the_same_product_and_equal_weight():
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 3), (3, 5)))
    new_B, new_A = balanced(100 * B, A / 100)
    assert relative_error(new_B @ new_A, B @ A) < 1e-12
    s = torch.linalg.svdvals(B @ A)[:3].diag()
    assert relative_error(new_B.mT @ new_B, s) < 1e-12
    assert relative_error(new_A @ new_A.mT, s) < 1e-12
    assert balanced(B.bfloat16(), A.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dead", [[0, 1, 2], [1]], ids=["B = 0", "one direction"])
def test_factors_of_a_smaller_product_are_left_alone(dead):
    """Else both would vanish there, and their gradients with them."""
    B, A = gradients((7, 3), 1)[0], gradients((3, 5), 1)[0]
    B[:, dead] = 0
    new_B, new_A = balanced(B, A)
    assert torch.equal(new_B, B) and torch.equal(new_A, A)


class Adapted(nn.Module):
    """A linear with adapters as peft keeps them."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 7).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(5, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, 7, bias=False)})

    def forward(self, x):
        return self.base(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_refactorization_changes_no_output_and_forgets_the_moments_of_the_factors():
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(), nn.LayerNorm(7), nn.Linear(7, 2)).double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    B, A = model[0].lora_B["default"].weight, model[0].lora_A["default"].weight
    assert [pair[0] is B and pair[1] is A for pair in lora_pairs(model)] == [True]
    before, old = model(x), B.detach().clone()
    refactorize(lora_pairs(model), optimizer)
    assert relative_error(model(x), before) < 1e-12
    assert relative_error(B, old) > 1e-3
    assert relative_error(B.mT @ B, A @ A.mT) < 1e-12
    assert B not in optimizer.state and A not in optimizer.state and model[2].weight in optimizer.state
    A.requires_grad_(False)
    assert list(lora_pairs(model)) == []


@pytest.mark.parametrize(
    "name, settings", [("AdamW", {}), ("GaLore", {"refresh_every": 3}), ("Fira", {"refresh_every": 3})]
)
def test_after_a_reset_an_optimizer_is_as_new(name, settings):
    model = build_model()
    optimizer = baselines.build(name, model, lr=0.01, rank=2, reset_every=3, **settings)
    train(model, optimizer, range(3))
    fresh_model = copy.deepcopy(model)
    fresh = baselines.build(name, fresh_model, lr=0.01, rank=2, **settings)
    train(model, optimizer, range(3, 5))
    train(fresh_model, fresh, range(3, 5))
    assert_same_weights(model, fresh_model)


# ---------------------------------------------------------------------- as a comparison uses them


class Model(nn.Module):
    """Matrices of three shapes, and an embedding, a norm, biases and a head for AdamW."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.square, self.tall, self.wide = nn.Linear(6, 6), nn.Linear(6, 9, bias=False), nn.Linear(9, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + torch.tanh(self.square(x))
        return self.head(self.norm(x + self.wide(torch.tanh(self.tall(x)))))


MATRICES = {"square.weight": (6, 6), "tall.weight": (9, 6), "wide.weight": (6, 9)}
REST = 2 * 11 * 6 + 6 + 6 + 2 * 6  # embedding and head, two biases, norm
SETTINGS = {
    "AdamW": {},
    "Muon": {},
    "GaLore": {"refresh_every": 3},
    "Fira": {"refresh_every": 3},
    "MLorc": {},
    "GUM": {"period": 3, "q": 0.5},
    "SO": {"density": 0.1, "refresh_every": 3},
    "MoFaSGD-lab": {"balance": 1.0, "probes": 1, "explore": 1, "second_moment": "update", "rank_budget": 3},
    "MoFaSGD": {"adjust_lr_fn": "match_rms_adamw", "adamw_lr": 0.002},
}
NAMES = pytest.mark.parametrize("name", list(SETTINGS))


def build_model(dtype=torch.float32):
    torch.manual_seed(0)
    return Model().to(dtype)


def build(name, model, **settings):
    return baselines.build(name, model, **{"lr": 0.02, "rank": 2, **SETTINGS[name], **settings})


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 11, (8, 3), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), (tokens * 3 + 1).flatten() % 11).backward()
        optimizer.step()


def assert_same_weights(model, other):
    for (name, value), reference in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(value, reference), name


def test_every_peer_is_tried_here():
    assert [name for name in baselines.names() if name != "Toy"] == list(SETTINGS)  # which tests/extending registers


@NAMES
def test_a_peer_moves_all_parameters_and_brings_the_loss_down(name):
    model = build_model()
    began = copy.deepcopy(model)
    tokens = torch.arange(11)[:, None].expand(11, 3)

    @torch.no_grad()
    def loss(of):
        return float(nn.functional.cross_entropy(of(tokens).flatten(0, 1), (tokens * 3 + 1).flatten() % 11))

    train(model, build(name, model, adamw_lr=0.02), range(30))
    assert loss(model) < 0.8 * loss(began)
    for (key, value), before in zip(model.named_parameters(), began.parameters()):
        assert not torch.equal(value, before), key


@NAMES
def test_all_peers_treat_the_same_tensors(name):
    model = build_model()
    optimizer = build(name, model, adamw_lr=0.005, weight_decay=0.1, adamw_weight_decay=0.3)
    named = {param: key for key, param in model.named_parameters()}
    own, rest = [], []
    for group in optimizer.param_groups:
        matrix = any(named[param] in MATRICES for param in group["params"])
        (own if matrix else rest).extend(named[param] for param in group["params"])
        assert group["lr"] * group.get("lr_scale", 1.0) == pytest.approx(0.02 if matrix else 0.005)
        assert group["weight_decay"] == (0.1 if matrix else 0.3)
    assert sorted(own) == sorted(MATRICES) and sorted(own + rest) == sorted(named.values())
    excluded = build(name, build_model(), exclude=["tall"])
    assert sum(len(group["params"]) for group in excluded.param_groups[:1]) == 2


def test_the_rest_is_left_to_adamw_and_matrices_to_muon_of_torch():
    model, other = build_model(), build_model()
    optimizer = build("Muon", model, momentum=0.9, weight_decay=0.1, adamw_betas=(0.7, 0.9), adamw_eps=1e-4)
    own = [param for key, param in other.named_parameters() if key in MATRICES]
    rest = [param for key, param in other.named_parameters() if key not in MATRICES]
    muon = torch.optim.Muon(own, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.02, betas=(0.7, 0.9), eps=1e-4, weight_decay=0.1)
    for step in range(4):
        train(model, optimizer, [step])
        train(other, _Both(muon, adamw), [step])
    assert_same_weights(model, other)


class _Both:
    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@NAMES
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(name, dtype):
    unbroken = build_model(dtype)
    settings = {"reset_every": 4} if name in ("AdamW", "Fira") else {}
    train(unbroken, build(name, unbroken, **settings), range(9))

    model = build_model(dtype)
    optimizer = build(name, model, **settings)
    train(model, optimizer, range(5))  # within a period and a refresh interval
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(5, 7))  # what was saved must not move with the run
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = build_model(dtype)
    torch.manual_seed(123)
    torch.randn(5)
    resumed.load_state_dict(saved["model"])
    again = build(name, resumed, lr=0.5, **settings)  # the checkpoint's rate wins
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, range(5, 9))
    assert_same_weights(resumed, unbroken)


@NAMES
def test_nothing_is_drawn_from_the_global_generator(name):
    results = []
    for seed in (1, 2):
        model = build_model()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train(model, build(name, model), range(4))
        assert torch.equal(torch.get_rng_state(), before)
        results.append(model)
    assert_same_weights(*results)


@pytest.mark.parametrize("name", ["MLorc", "GUM", "SO", "MoFaSGD"])
def test_a_seed_changes_what_is_random(name):
    models = [build_model(), build_model()]
    for seed, model in enumerate(models):
        train(model, build(name, model, seed=seed), range(6))
    assert not torch.equal(models[0].tall.weight, models[1].tall.weight)


def _expected_bytes(name, optimizer, r=2):
    """The formulas of the docstrings, in fp32; torch's AdamW adds a counter of 4 bytes for each tensor."""
    shapes = MATRICES.values()
    small_large = [(min(shape), max(shape)) for shape in shapes]
    if name == "AdamW":
        return sum(8 * m * n + 4 for m, n in shapes)
    if name == "Muon":
        return sum(4 * m * n for m, n in shapes)
    if name == "GaLore":
        return sum(4 * (s * r + 2 * l * r) for s, l in small_large)
    if name == "Fira":
        return sum(4 * (s * r + 2 * l * r) + 4 for s, l in small_large)
    if name == "MLorc":
        return sum(8 * r * (m + n + 1) for m, n in shapes)
    if name == "SO":
        return sum(16 * int(0.1 * m * n) for m, n in shapes)
    if name == "GUM":
        sampled = [is_sampled(0.5, 0, 1, index) for index in range(3)]
        assert 0 < sum(sampled) < 3  # both branches are counted
        return sum(4 * (s * r + (s if full else r) * l) for (s, l), full in zip(small_large, sampled))
    if name == "MoFaSGD-lab":  # at twice the rank, with its ranks, spectra and second moments
        caps = [(m, n, min(2 * r, m, n)) for m, n in shapes]
        return sum(4 * (cap * (m + n + 2) + m + n) + 8 for m, n, cap in caps)
    # MoFaSGD: factors and, for fp32 weights, working copies of that size; each shape's is padded to 128 elements.
    return sum(8 * 128 * math.ceil(r * (m + n + 1) / 128) for m, n in shapes)


@NAMES
def test_the_state_has_the_documented_size(name):
    model = build_model()
    optimizer = build(name, model)
    train(model, optimizer, range(4))
    adamw = 8 * REST + 4 * (len(list(model.parameters())) - len(MATRICES))
    assert baselines.state_bytes(optimizer) == _expected_bytes(name, optimizer) + adamw


def test_the_state_of_any_torch_optimizer_can_be_counted():
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert baselines.state_bytes(optimizer) == 0
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert baselines.state_bytes(optimizer) == 4 * (12 + 4)
    masters = build("MoFaSGD", model := build_model(torch.bfloat16), master_weights=True)
    train(model, masters, range(2))
    rest = 4 * REST + 4 * 6
    assert baselines.state_bytes(masters) == 3 * 128 * (4 + 2) + sum(4 * m * n for m, n in MATRICES.values()) + rest


def test_a_schedule_moves_matrices_and_rest():
    model = build_model()
    optimizer = build("GaLore", model, lr=0.02, adamw_lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, [0])
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.005]
    before = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, [1])
    assert_same_weights(model, before)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:  # still the ones that count
        group["lr"] = 0.0
    train(model, optimizer, [2])
    assert_same_weights(model, before)


def test_matrices_without_a_gradient_stay():
    model = build_model()
    optimizer = build("MLorc", model, weight_decay=0.5)
    model.tall.requires_grad_(False)
    before = model.tall.weight.clone()
    train(model, optimizer, range(2))
    assert torch.equal(model.tall.weight, before)


def test_a_closure_is_called_with_gradients_enabled():
    model = build_model()
    optimizer = build("GUM", model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.arange(6)).square().sum()
        loss.backward()
        return loss

    first, second = (optimizer.step(closure).item() for _ in range(2))
    assert first > second > 0


def test_mofasgd_is_the_products_own():
    assert type(build("MoFaSGD", build_model())) is MoFaSGD
    assert type(build("SO", build_model())) is Baseline


@pytest.mark.parametrize("settings, rank", [({}, 8), ({"rank": 3}, 3)])
def test_the_rank_is_mofasgd_s_unless_given(settings, rank):
    model = nn.Sequential(nn.Linear(9, 20))
    optimizer = baselines.build("GaLore", model, lr=0.1, **settings)
    model(torch.ones(2, 9)).sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["P"].shape == (9, rank)


def test_a_model_of_matrices_alone_needs_no_adamw():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    optimizer = baselines.build("GaLore", model, lr=0.1, rank=2)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="takes all its parameters when it is built"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))]})
    with pytest.raises(ValueError, match="holds 2 optimizers, this one is made of 1"):
        optimizer.load_state_dict(build("GaLore", build_model()).state_dict())


@pytest.mark.parametrize(
    "name, settings, message",
    [
        (
            "Galore",
            {},
            r"no baseline 'Galore'\. There are AdamW, Muon, GaLore, Fira, MLorc, GUM, SO, MoFaSGD-lab, MoFaSGD",
        ),
        (
            "GaLore",
            {"lr": 1.0, "gamma": 2.0},
            r"GaLore has no setting 'gamma'\. Its own are refresh_every, alpha.*lr, rank",
        ),
        ("Muon", {"lr": 1.0, "reset_every": 5}, "Muon has no setting 'reset_every'"),
        ("MoFaSGD", {"period": 3}, "unknown option 'period' of MoFaSGD"),
        ("AdamW", {}, "AdamW needs an lr"),
        ("AdamW", {"lr": 1.0, "betas": (0.9, 1.0)}, "^betas=1.0 must be >= 0 and < 1"),
        ("MLorc", {"lr": 1.0, "betas": 0.9}, r"^betas=0.9 must be two numbers"),
        ("AdamW", {"lr": 1.0, "reset_every": -1}, "reset_every=-1 must be a whole number >= 0"),
        ("Muon", {"lr": 1.0, "momentum": 1.0}, "momentum=1.0 must be >= 0 and < 1"),
        ("Muon", {"lr": 1.0, "ns_steps": 0}, "ns_steps=0 must be a whole number >= 1"),
        ("SO", {"lr": -1.0}, "lr=-1.0 must be > 0"),
        ("SO", {"lr": 1.0, "density": 1.5}, "density=1.5 must be > 0 and <= 1"),
        ("SO", {"lr": 1.0, "density": 0}, "density=0 must be > 0"),
        ("SO", {"lr": 1.0, "refresh_every": 0}, "refresh_every=0 must be a whole number >= 1"),
        ("GaLore", {"lr": 1.0, "refresh_every": 0}, "refresh_every=0 must be a whole number >= 1"),
        ("GaLore", {"lr": 1.0, "sketched": 1}, "sketched=1 must be true or false"),
        ("Fira", {"lr": 1.0, "sketched": True}, "Fira has no setting 'sketched'"),
        ("GaLore", {"lr": 1.0, "alpha": 0}, "alpha=0 must be > 0"),
        ("GaLore", {"lr": 1.0, "eps": 0}, "^eps=0 must be > 0"),
        ("GaLore", {"lr": 1.0, "rank": 0}, "rank=0 must be a whole number >= 1"),
        ("Fira", {"lr": 1.0, "gamma": 0.5}, "gamma=0.5 must be >= 1"),
        ("MLorc", {"lr": 1.0, "oversampling": -1}, "oversampling=-1 must be a whole number >= 0"),
        ("MLorc", {"lr": 1.0, "power_iterations": 0.5}, "power_iterations=0.5 must be a whole number >= 0"),
        ("GUM", {"lr": 1.0, "q": 1.0}, "q=1.0 must be >= 0 and < 1"),
        ("GUM", {"lr": 1.0, "period": 0}, "period=0 must be a whole number >= 1"),
        ("GUM", {"lr": 1.0, "momentum": 1.0}, "momentum=1.0 must be >= 0 and < 1"),
        ("GUM", {"lr": 1.0, "adjust_lr_fn": "big"}, "adjust_lr_fn='big' must be one of"),
    ],
)
def test_what_cannot_be_right_is_refused_with_what_would_be(name, settings, message):
    with pytest.raises(ValueError, match=message):
        baselines.build(name, build_model(), **{"rank": 2, **settings})


# ---------------------------------------------------------------------- gradients through a projector


@pytest.mark.parametrize("name", ["GaLore", "GUM"])
def test_a_sketched_run_equals_the_one_that_forms_gradients(name):
    models = build_model(torch.float64), build_model(torch.float64)
    for model, sketched in zip(models, (False, True)):
        model.twice = model.square  # a weight used twice
        settings = {"reset_every": 5} if name == "GaLore" else {}
        optimizer = build(name, model, sketched=sketched, **settings)
        for step in range(8):
            optimizer.zero_grad()
            for micro in range(2):
                tokens = torch.randint(0, 11, (4, 3), generator=torch.Generator().manual_seed(2 * step + micro))
                x = model.twice(model(tokens)[..., :6])
                (x.square().mean() + model(tokens).logsumexp(-1).mean()).backward()
            optimizer.step()
    for (key, value), reference in zip(models[1].named_parameters(), models[0].parameters()):
        assert relative_error(value, reference) < 1e-10, key


@SHAPES
@pytest.mark.parametrize("projected", [False, True])
def test_the_rows_of_an_embedding_add_up_to_its_gradient(shape, projected):
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    P = torch.randn(min(shape), 2, generator=generator) if projected else None
    rows, whole = (ProjectedGradient(shape, lambda: P) for _ in range(2))
    for _ in range(2):
        ids, dy = torch.randint(m, (4, 3), generator=generator), torch.randn(4, 3, n, generator=generator)
        rows.add_rows(ids, dy)
        whole.add_gradient(F.one_hot(ids.flatten(), m).float().mT @ dy.flatten(0, 1))
    assert relative_error(rows.value, whole.value) < 1e-6


@pytest.mark.parametrize("through_linear", [True, False], ids=["linear", "hook"])
def test_between_refreshes_only_the_projected_gradient_lives(through_linear):
    model = build_model(torch.bfloat16)
    optimizer = build("GaLore", model, sketched=True)
    for step in range(7):
        train_backward(model, optimizer, step, through_linear)
        for key, (m, n) in MATRICES.items():
            param = model.get_parameter(key)
            captured = optimizer.matrices._captured[param]
            rows = min(m, n) if step % 3 == 0 else 2
            assert param.grad is None and captured.value.shape == (rows, max(m, n))
            assert captured.value.dtype == (torch.float32 if rows == 2 else torch.bfloat16)
        optimizer.step()
        assert all(captured.value is None for captured in optimizer.matrices._captured.values())


def train_backward(model, optimizer, step, through_linear):
    optimizer.zero_grad()
    if through_linear:
        model(torch.arange(step, step + 6) % 11).square().sum().backward()
    else:
        sum(param.square().sum() for param in model.parameters()).backward()


@pytest.mark.parametrize("name", ["GaLore", "GUM"])
def test_a_sketched_run_resumes_bit_for_bit(name):
    unbroken = build_model(torch.bfloat16)
    train(unbroken, build(name, unbroken, sketched=True), range(8))
    model = build_model(torch.bfloat16)
    optimizer = build(name, model, sketched=True)
    train(model, optimizer, range(5))
    resumed = build_model(torch.bfloat16)
    resumed.load_state_dict(model.state_dict())
    again = build(name, resumed, sketched=True)
    again.load_state_dict(optimizer.state_dict())
    train(resumed, again, range(5, 8))
    assert_same_weights(resumed, unbroken)


def test_a_model_is_given_back_with_its_gradients():
    model, other = build_model(), build_model()
    optimizer = build("GaLore", model, sketched=True)
    train(model, optimizer, range(1))
    optimizer.matrices.detach()
    model.load_state_dict(other.state_dict())
    train(model, build("MLorc", model), range(2))
    train(other, build("MLorc", other), range(2))
    assert_same_weights(model, other)
    before = model.tall.weight.clone()
    train(model, optimizer, [2])  # by .grad now
    assert not torch.equal(model.tall.weight, before)


def test_forgotten_captured_gradients_move_nothing():
    model = build_model()
    optimizer = build("GaLore", model, sketched=True)
    train_backward(model, optimizer, 0, True)
    optimizer.zero_grad()
    before = copy.deepcopy(model)
    optimizer.step()
    assert_same_weights(model, before)
