"""Directions that hold nothing are no noise: the next gradient is projected on them too, and noise is another in every run."""

import torch

from ds_mofa.linalg.factors import Factors, leading_svd, live_directions, start_factors, update_factors
from tests.unit.dense_reference import departure_from_orthonormal

M, N, R = 48, 32, 8


def momentum(error, leading=leading_svd):
    """The momentum, dense, after steps of 1, 2 and 3 tokens in turn, as of an expert that few go to."""
    generator = torch.Generator().manual_seed(3)
    tests = [torch.randn(rows, R, generator=generator) / R**0.5 for rows in (M, N)]
    factors = None
    for step in range(6):
        left, right = (torch.randn(1 + step % 3, rows, generator=generator) for rows in (M, N))
        G = ((1 + error) * left.double().mT @ right.double()).float()
        if factors is None:
            psi, omega = tests
            factors = start_factors((G @ omega)[None], (G.mT @ psi)[None], psi[None], gamma=0.1)
        else:
            factors = update_factors(
                factors, (G @ factors.V[0])[None], (G.mT @ factors.U[0])[None], beta=0.9, gamma=0.1
            )
        assert all(departure_from_orthonormal(side) < 1e-5 for side in (factors.U[0], factors.V[0]))
    return ((factors.U * factors.sigma.unsqueeze(-2)) @ factors.V.mT)[0]


def test_gradients_of_few_directions_are_met_alike_in_runs_that_round_otherwise():
    one, other = momentum(0.0), momentum(1e-7)
    assert not torch.equal(one, other)
    assert (one - other).norm() < 3e-5 * one.norm()


def test_noise_would_be_seen(monkeypatch):
    """The control."""
    monkeypatch.setattr("ds_mofa.linalg.factors._filled", lambda P, live: P)
    one, other = momentum(0.0), momentum(1e-7)
    assert (one - other).norm() > 1e-2 * one.norm()


def test_a_start_from_fewer_tokens_has_as_many_directions_each():
    generator = torch.Generator().manual_seed(0)
    psi, omega = (torch.randn(4, rows, R, generator=generator) / R**0.5 for rows in (M, N))
    G = torch.stack(
        [torch.randn(M, t, generator=generator) @ torch.randn(t, N, generator=generator) for t in (1, 2, 4, 40)]
    )
    factors: Factors = start_factors(G @ omega, G.mT @ psi, psi, gamma=1.0)
    assert live_directions(factors.sigma).sum(-1).tolist() == [1, 2, 4, 4]
    assert (factors.sigma[0, 1:] == 0).all() and (factors.sigma[1, 2:] == 0).all()
    for side in (factors.U, factors.V):
        assert max(departure_from_orthonormal(one) for one in side) < 1e-6
    whole = (factors.U * factors.sigma.unsqueeze(-2)) @ factors.V.mT
    assert ((whole - G)[:3].flatten(1).norm(dim=1) < 1e-5 * G[:3].flatten(1).norm(dim=1)).all()
