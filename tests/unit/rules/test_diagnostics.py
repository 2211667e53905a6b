"""Diagnostics against the dense matrices that they speak of."""

import contextlib

import pytest
import torch
from torch import nn

import ds_mofa
from ds_mofa.linalg.factors import Factors, gram_matrices, update_factors
from ds_mofa.rules.diagnostics import MEASURES, measure
from tests.unit.dense_reference import dense, random_factors, sketches, tangent_projection

BETA, GAMMA = 0.85, 0.15


@pytest.mark.parametrize("kind", ["generic", "zero momentum", "zero gradient", "nothing"])
def test_measures_are_those_of_the_dense_matrices(kind):
    generator = torch.Generator().manual_seed(0)
    factors = random_factors(24, 17, 4, generator)
    G = torch.randn(1, 24, 17, generator=generator, dtype=torch.float64)
    if kind in ("zero momentum", "nothing"):
        factors = Factors(factors.U, 0 * factors.sigma, factors.V)
    if kind in ("zero gradient", "nothing"):
        G = 0 * G
    Y, Z = sketches(factors, G)
    new = update_factors(factors, Y, Z, beta=BETA, gamma=GAMMA)
    left, right = gram_matrices(factors, Y, Z)
    [values] = measure(factors.sigma, left, right, new.sigma, beta=BETA, gamma=GAMMA).tolist()
    values = dict(zip(MEASURES, values))

    projected = tangent_projection(factors.U[0], factors.V[0], G[0])
    whole = BETA * dense(factors)[0] + GAMMA * projected
    singular = torch.linalg.svdvals(whole)
    energy = singular.square() / singular.square().sum()
    assert values["projected_grad_norm"] == pytest.approx(float(projected.norm()), abs=1e-12)
    assert values["momentum_norm"] == pytest.approx(float(dense(new)[0].norm()), abs=1e-12)
    assert values["orthogonality_error"] < 1e-14
    if kind == "nothing":
        assert values["kept_energy"] == 1 and values["effective_rank"] == 0
        return
    assert values["kept_energy"] == pytest.approx(float(energy[:4].sum()), abs=1e-12)
    share = energy[:4] / energy[:4].sum()
    assert values["effective_rank"] == pytest.approx(float((-share * share.log()).sum().exp()), abs=1e-10)


def test_a_basis_that_has_drifted_is_seen():
    factors = random_factors(24, 17, 4, torch.Generator().manual_seed(0))
    tilted = Factors(factors.U * 1.01, factors.sigma, factors.V)
    grams = gram_matrices(tilted, tilted.U, tilted.V)
    values = measure(tilted.sigma, *grams, tilted.sigma, beta=BETA, gamma=GAMMA)
    assert float(values[0, 2]) == pytest.approx(1.01**2 - 1)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_reports_come_when_asked_for(every):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    optimizer = ds_mofa.MoFaSGD(model, lr=1e-3, rank=2, diagnostics_every=every)
    heard = []
    optimizer.matrices.on_report = heard.append
    for _ in range(5):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    # the first step has no factors to speak of
    assert [report.step for report in heard] == {0: [], 1: [2, 3, 4, 5], 2: [2, 4]}[every]
    for report in heard:
        assert set(report.by_matrix()) == {"0.weight", "1.weight"}
        summary = report.summary()
        assert set(summary) == {*MEASURES, "skipped_steps"} and summary["skipped_steps"] == 0
        parts = [values["projected_grad_norm"] for values in report.by_matrix().values()]
        assert summary["projected_grad_norm"] == pytest.approx(sum(part**2 for part in parts) ** 0.5)


@pytest.mark.parametrize("options", [{}, {"explore": 2, "balance": 0.5}, {"master_weights": True}], ids=str)
def test_a_receiver_that_raises_finds_the_step_whole(options):
    """A full disk, a network: the exception comes through, and training goes on as if nobody had been told."""
    ends = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 16)).bfloat16()
        optimizer = ds_mofa.MoFaSGD(model, rank=4, lr=2e-3, diagnostics_every=2, **options)
        heard = []

        def receive(report):
            heard.append(report.step)
            if fails:
                raise OSError(28, "No space left on device")

        optimizer.matrices.on_report = receive
        for step in range(6):
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step)).bfloat16()
            model(x).float().square().mean().backward()
            optimizer.clip_grad_norm_(1e-3 if step == 3 else 1e9)  # a clipping factor must not stay for the next step
            with pytest.raises(OSError, match="No space") if fails and step % 2 else contextlib.nullcontext():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True) if step != 3 else model.zero_grad()
        assert heard == [2, 4, 6]
        state = optimizer.named_state_dict()["mofasgd"]
        ends.append([*model.parameters(), *(t for one in state["matrices"].values() for t in one.values())])
        ends[-1].append(state["steps"])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
