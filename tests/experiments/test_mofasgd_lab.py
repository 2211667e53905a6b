"""MoFaSGD-lab: with everything off it is MoFaSGD; each option against its equation on dense float64 matrices."""

import math

import pytest
import torch
from torch import nn

from ds_mofa import MoFaSGD
from ds_mofa.linalg.factors import Factors
from experiments import baselines
from experiments.baselines.laboratory import MoFaSGDLab
from experiments.baselines.laboratory.probes import range_estimate
from experiments.baselines.laboratory.ranks import allotted_ranks
from experiments.baselines.laboratory.scaling import balancing
from tests.unit.dense_reference import dense, next_momentum, relative_error, truncated

LR, BETA, R = 0.01, 0.85, 3
SHAPES = pytest.mark.parametrize("shape", [(12, 17), (17, 12)], ids=["wide", "tall"])


def gradients(shape, count, rank=None):
    generator = torch.Generator().manual_seed(1)
    rank = min(shape) if rank is None else rank
    U = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(0, -1, rank, dtype=torch.float64)
    V = torch.randn(shape[1], rank, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, rank, rank, generator=generator, dtype=torch.float64)
    return [U @ (torch.diag(sizes) + 0.2 * part) @ V.mT for part in noise]


class LastStep:
    """Runs ``grads`` and keeps what the last step began with: ``old``, its factors, G, and D, what it moved along."""

    def __init__(self, shape, grads, **settings):
        param = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.optimizer = MoFaSGDLab([param], **{"rank": R, **settings})
        self.optimizer.param_groups[0]["lr"] = LR
        for G in grads:
            self.state = self.optimizer.state[param]
            self.old = self.factors() if "U" in self.state else None
            before, param.grad = param.detach().clone(), G.clone()
            self.optimizer.step()
        self.G, self.new = grads[-1][None], self.factors() if "U" in self.state else None
        self.D = (before - param.detach())[None] / (LR * 0.2 * math.sqrt(max(shape)))

    def factors(self):
        return Factors(*(self.state[key][None] for key in ("U", "sigma", "V")))

    def momentum(self):
        """beta M + gamma G_hat before truncation."""
        return next_momentum(self.old, self.G, BETA, 1 - BETA)


def polar(M, r, power=0.0):
    U, s, Vt = torch.linalg.svd(M)
    s = s[..., :r] ** power
    return U[..., :r] @ torch.diag_embed(s / s.norm(dim=-1, keepdim=True) * math.sqrt(r)) @ Vt[..., :r, :]


def close(value, reference, tolerance=1e-9):
    return relative_error(value, reference) < tolerance


# ---------------------------------------------------------------------- nothing on


def test_with_all_options_off_it_is_mofasgd():
    def model():
        torch.manual_seed(0)
        layers = [nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16, bias=False), nn.Tanh(), nn.Linear(16, 16)]
        return nn.Sequential(nn.Embedding(11, 16), *layers, nn.LayerNorm(16), nn.Linear(16, 11))

    ours, theirs = model(), model()
    common = dict(lr=0.01, rank=4, adamw_lr=1e-3, weight_decay=0.1, seed=5)
    lab = baselines.build("MoFaSGD-lab", ours, **common)
    mofasgd = MoFaSGD(theirs, rounding="nearest", adjust_lr_fn="match_rms_adamw", **common)
    for step in range(8):
        tokens = torch.randint(0, 11, (32,), generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((ours, lab), (theirs, mofasgd)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(tokens), (3 * tokens + 1) % 11).backward()
            optimizer.step()
    for value, reference in zip(ours.parameters(), theirs.parameters()):
        assert relative_error(value, reference) < 1e-5


@SHAPES
def test_factors_and_direction_follow_the_equations(shape):
    step = LastStep(shape, gradients(shape, 4))
    assert close(dense(step.new), truncated(step.momentum(), R))
    assert close(step.D, polar(step.momentum(), R))


def test_no_gradient_and_no_momentum_move_nothing():
    step = LastStep((12, 17), [torch.zeros(12, 17, dtype=torch.float64)] * 3, balance=1.0, soft=-1.0, nesterov=True)
    assert step.D.abs().max() == 0


# ---------------------------------------------------------------------- the direction


@SHAPES
def test_nesterov(shape):
    step = LastStep(shape, gradients(shape, 4), nesterov=True)
    ahead = next_momentum(step.new, step.G, 0.0, 0.0) + BETA * dense(step.new)
    ahead = ahead + (1 - BETA) * next_momentum(step.old, step.G, 0.0, 1.0)
    assert close(dense(step.new), truncated(step.momentum(), R))
    assert close(step.D, polar(ahead, R))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("ratio, count", [(2, 2 * R), (1 / 3, 1)])
def test_update_rank(ratio, count, nesterov):
    step = LastStep((12, 17), gradients((12, 17), 4), update_rank=ratio, nesterov=nesterov)
    source = step.momentum()
    if nesterov:
        source = BETA * truncated(source, R) + (1 - BETA) * next_momentum(step.old, step.G, 0.0, 1.0)
    assert close(step.D, polar(source, count), 1e-7)
    assert close(dense(step.new), truncated(step.momentum(), R))


@pytest.mark.parametrize("power", [-1.0, 0.5, 1.0])
def test_soft(power):
    step = LastStep((12, 17), gradients((12, 17), 4), soft=power)
    assert close(step.D, polar(step.momentum(), R, power))


@pytest.mark.parametrize("sides", ["both", "rows", "columns"])
def test_second_moment_of_the_gradient(sides):
    step = LastStep((12, 17), gradients((12, 17), 4), second_moment="gradient", second_moment_sides=sides, beta2=0.0)
    x = (step.G @ step.old.V).norm(dim=-1) if sides != "columns" else torch.ones(1, 12, dtype=torch.float64)
    z = (step.G.mT @ step.old.U).norm(dim=-1) if sides != "rows" else torch.ones(1, 17, dtype=torch.float64)
    expected = polar(step.momentum(), R) / x[..., None] / z[..., None, :]
    assert close(step.D, expected * math.sqrt(R) / expected.norm())


def test_second_moment_of_the_update_levels_its_rows():
    options = {"second_moment": "update", "second_moment_sides": "rows", "beta2": 0.0, "soft": 0.5}
    step = LastStep((12, 17), gradients((12, 17), 4), **options)
    rows = step.D.norm(dim=-1)
    assert close(rows, torch.full_like(rows, math.sqrt(R / 12)))
    plain = polar(step.momentum(), R, 0.5)
    assert close(step.D / rows[..., None], plain / plain.norm(dim=-1, keepdim=True))


def test_exploring_adds_random_directions_that_the_momentum_does_not_have():
    grads = gradients((12, 17), 4)
    step, plain = LastStep((12, 17), grads, explore=2, explore_scale=0.5), LastStep((12, 17), grads)
    more = step.D - plain.D
    size = torch.linalg.svdvals(more)[0]
    assert close(size[:2], torch.full((2,), 0.5)) and size[2:].max() < 1e-9
    assert (more @ step.old.V).abs().max() < 1e-9 and (step.old.U.mT @ more).abs().max() < 1e-9
    assert (more * step.G).sum() > 0  # downhill


def test_exploring_by_coordinates_moves_few_columns():
    grads = gradients((12, 17), 4)
    step, plain = LastStep((12, 17), grads, explore=2, explore_by="coordinates"), LastStep((12, 17), grads)
    more = step.D - plain.D
    moved = more.norm(dim=-2)[0] > 1e-9
    assert int(moved.sum()) == 2
    missed = step.G - next_momentum(step.old, step.G, 0.0, 1.0)
    assert close(more[..., moved], polar(missed[..., moved], 2))


def test_exploring_rows_and_columns_moves_both():
    grads = gradients((12, 17), 4)
    columns = LastStep((12, 17), grads, explore=2, explore_by="coordinates")
    both = LastStep((12, 17), grads, explore=2, explore_by="coordinates", explore_sides="both")
    more = both.D - columns.D
    moved = more.norm(dim=-1)[0] > 1e-9
    assert int(moved.sum()) == 2
    missed = both.G - next_momentum(both.old, both.G, 0.0, 1.0)
    assert close(more[:, moved], polar(missed[:, moved], 2))


def test_exploring_by_signs_moves_all_columns_alike():
    grads = gradients((12, 17), 4)
    step, plain = LastStep((12, 17), grads, explore=1, explore_by="signs"), LastStep((12, 17), grads)
    more = step.D - plain.D
    assert close(more.norm(dim=-2), torch.full((1, 17), 1 / math.sqrt(17), dtype=torch.float64))
    missed = step.G - next_momentum(step.old, step.G, 0.0, 1.0)
    e = more.mT @ missed @ missed.mT @ more  # more = h e^T / |h| with h = missed e
    e = torch.linalg.eigh(e)[1][..., -1:]
    assert close(more, polar(missed @ e @ e.mT, 1))


# ---------------------------------------------------------------------- the momentum


@SHAPES
def test_probes_find_a_missed_part_of_their_rank(shape):
    grads = gradients(shape, 4, rank=2)
    step = LastStep(shape, [gradients(shape, 1)[0], grads[0], grads[1]], probes=2)
    exact = BETA * dense(step.old) + (1 - BETA) * step.G
    assert close(dense(step.new), truncated(exact, R), 1e-6)
    assert not close(dense(step.new), truncated(step.momentum(), R), 1e-3)


def test_enough_random_directions_see_all_of_the_gradient():
    step = LastStep((12, 17), gradients((12, 17), 4), probes=17 - R, probe_rule="random")
    assert close(dense(step.new), truncated(BETA * dense(step.old) + (1 - BETA) * step.G, R))


def test_the_range_estimate_is_exact_at_its_rank_and_has_no_preferred_basis():
    generator = torch.Generator().manual_seed(0)
    omega, psi, A, B = (torch.randn(9, k, generator=generator, dtype=torch.float64) for k in (2, 5, 2, 2))
    G = (A @ B.mT)[None]
    H, J = G @ omega, G.mT @ psi
    assert close(range_estimate(H, J, psi.mT @ H), G, 1e-6)
    assert range_estimate(0 * H, 0 * J, psi.mT @ (0 * H)).abs().max() == 0


def test_probes_estimate_the_square_norm_of_the_gradient():
    grads, squares = gradients((12, 17), 2), []
    options = {"balance": 1.0, "balance_by": "gradient", "probes": 4, "probe_weight": 0.0, "beta2": 0.0}
    for seed in range(60):
        step = LastStep((12, 17), grads, seed=seed, **options)
        squares.append(step.state["square"])
    mean, true = torch.stack(squares).mean(), step.G.square().sum()
    assert abs(mean / true - 1) < 0.15
    assert close(dense(step.new), truncated(step.momentum(), R))  # they only measure


def test_shrinking_takes_the_first_lost_singular_value_off_those_kept():
    step = LastStep((12, 17), gradients((12, 17), 4), shrink=0.5)
    spectrum = torch.linalg.svdvals(step.momentum())
    assert close(step.new.sigma, spectrum[:, :R] - 0.5 * spectrum[:, R : R + 1])
    assert close(step.D, polar(step.momentum(), R))


def test_warm_up_and_reset():
    grads = gradients((12, 17), 5)
    step = LastStep((12, 17), grads, beta_warmup=10)
    assert close(dense(step.new), truncated(next_momentum(step.old, step.G, BETA / 2, 1 - BETA / 2), R))
    step = LastStep((12, 17), grads, momentum_reset=4)
    assert close(dense(step.new), truncated(next_momentum(step.old, step.G, 0.0, 1 - BETA), R))


def test_oracles():
    grads = gradients((12, 17), 4)
    step = LastStep((12, 17), grads, oracle="gradient")
    exact = BETA * dense(step.old) + (1 - BETA) * step.G
    assert close(dense(step.new), truncated(exact, R), 1e-6) and close(step.D, polar(exact, R), 1e-6)
    M = sum((1 - BETA) * BETA ** (3 - t) * G for t, G in enumerate(grads))[None]
    assert close(LastStep((12, 17), grads, oracle="momentum").D, polar(M, R), 1e-6)


# ---------------------------------------------------------------------- several matrices


def test_balancing():
    factors = balancing([torch.tensor([1.0, 4.0]), torch.tensor([0.0, 16.0])], 0.5)
    assert torch.allclose(torch.cat(factors), torch.tensor([2.0, 1.0, 1.0, 0.5]))


def test_a_balanced_update_and_one_scaled_by_rank():
    shapes = [(12, 17), (9, 9)]
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    optimizer = MoFaSGDLab(params, rank=R, balance=1.0, rank_scale=1.0)
    optimizer.param_groups[0]["lr"] = LR
    for size, param in zip((1.0, 100.0), params):
        param.grad = size * gradients(tuple(param.shape), 1)[0]
    optimizer.step()
    norms = [float(optimizer.state[param]["sigma"].norm()) for param in params]
    mean = math.sqrt(norms[0] * norms[1])
    for (m, n), norm, param in zip(shapes, norms, params):
        f = 0.2 * math.sqrt(max(m, n)) * math.sqrt(min(m, n) / R)
        live = (R + 1) // 2  # the start's
        assert float(param.detach().norm()) == pytest.approx(LR * f * math.sqrt(live) * mean / norm, rel=1e-9)


def test_ranks_go_where_they_are_worth_most():
    slow, steep = torch.linspace(2, 1, 8), 10 * 0.1 ** torch.arange(8)
    [many, few] = allotted_ranks([slow.expand(2, 8), steep[None]], [10, 10], 4)
    assert many.tolist() == [5, 5] and few.tolist() == [2]
    assert [ranks.tolist() for ranks in allotted_ranks([slow.expand(3, 8)], [10], 4)] == [[4, 4, 4]]
    assert [ranks.tolist() for ranks in allotted_ranks([slow[None], 100 * slow[None]], [10, 10], 4)] == [[2], [6]]
    cheap, dear = allotted_ranks([slow[None], slow[None]], [10, 30], 4)
    assert cheap.tolist() == [8] and dear.tolist() == [2]  # 8 * 10 + 2 * 30 = 140 of 160, and one more costs 30


@pytest.mark.parametrize("rule", ["gain", "share"])
def test_a_rank_budget_is_kept_and_its_ranks_are_the_momentum_s(rule):
    shapes = [(30, 40), (24, 24)]
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = MoFaSGDLab(params, rank=4, rank_budget=3, rank_rule=rule)
    optimizer.param_groups[0]["lr"] = LR
    seen = set()
    for t in range(9):
        for size, rank, param in zip((1, 5), (24, 2), params):
            G = gradients(tuple(param.shape), t + 1, rank)[t]
            param.grad = size * G.float()
        old = [dict(optimizer.state[param]) for param in params]
        optimizer.step()
        ranks = [int(optimizer.state[param]["rank"]) for param in params]
        assert sum(r * (m + n + 1) for r, (m, n) in zip(ranks, shapes)) <= 4 * sum(m + n + 1 for m, n in shapes)
        assert all(2 <= r <= 8 for r in ranks)
        seen.add(tuple(ranks))
        for param, before, r in zip(params, old, ranks):
            U, sigma, V = (optimizer.state[param][key] for key in ("U", "sigma", "V"))
            assert int((sigma > 0).sum()) <= r and U[:, r:].abs().max() == 0
            assert (U.mT @ U)[sigma > 0][:, sigma > 0].sub(torch.eye(int((sigma > 0).sum()))).abs().max() < 1e-5
            if t:
                given = Factors(*(before[key][None] for key in ("U", "sigma", "V")))
                expected = truncated(
                    next_momentum(given, param.grad[None], BETA, 1 - BETA), min(r, int(before["rank"]))
                )
                assert relative_error(dense(Factors(U[None], sigma[None], V[None])), expected) < 1e-5
    assert len(seen) > 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"soft": 2.0}, "soft=2.0 must be"),
        ({"oracle": "all"}, "oracle='all' must be one of"),
        ({"balance_by": "gradient"}, "set probes to 1"),
        ({"rank_budget": 5, "update_rank": 2}, "set one of them"),
        ({"oracle": "gradient", "probes": 1}, "an oracle sees all"),
    ],
)
def test_what_cannot_be_right_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoFaSGDLab([nn.Parameter(torch.ones(9, 9))], rank=2, **settings)
