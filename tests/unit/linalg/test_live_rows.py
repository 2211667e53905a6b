"""Rows of zeros, of tokens that never came: no basis reaches into them."""

import pytest
import torch

from ds_mofa.linalg.exploring import Look, directions
from ds_mofa.linalg.factors import Factors, resized, start_factors, update_many
from ds_mofa.linalg.orthonormal import Side, complements
from tests.unit.dense_reference import departure_from_orthonormal

M, N, R = 60, 20, 6
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=str)


def rows(live, columns, dtype, rank=None, seed=0):
    """(2, M, columns), zero from row ``live`` on, of this rank."""
    generator = torch.Generator().manual_seed(seed)
    rank = columns if rank is None else rank
    X = torch.randn(2, M, rank, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(2, rank, columns, generator=generator, dtype=torch.float64)
    X[:, live:] = 0
    return X.to(dtype)


def started(dtype, live=40, rank=R):
    G = rows(live, N, dtype, rank)
    generator = torch.Generator().manual_seed(1)
    psi, omega = (torch.randn(2, size, R, generator=generator, dtype=torch.float64).to(dtype) for size in (M, N))
    return start_factors(G @ omega, G.mT @ psi, psi, gamma=1.0)


def check(U, live, tolerance):
    assert not U[:, live:].any()
    assert U[:, :live].any(-1).all()
    assert max(departure_from_orthonormal(one) for one in U) < tolerance


@DTYPES
@pytest.mark.parametrize("rank", [R, 2], ids=["enough directions", "few"])
def test_a_start_and_updates_stay_within_the_rows_that_came(rank, dtype, tolerance):
    """With few directions the basis is filled up; more rows come later."""
    factors, live = started(dtype, rank=rank), 40
    check(factors.U, live, tolerance)
    for step, live in enumerate([40, 45, 50]):
        G = rows(live, N, dtype, rank, seed=step)
        [factors] = update_many([(factors, G @ factors.V, G.mT @ factors.U)], beta=0.9, gamma=1.0)
        check(factors.U, live, tolerance)


@DTYPES
def test_so_do_directions_that_are_filled_in(dtype, tolerance):
    U = started(dtype).U
    X = torch.cat([rows(40, 2, dtype), torch.zeros(2, M, 3, dtype=dtype)], dim=-1)
    [basis] = complements([Side(U, X)])
    P = torch.eye(R + 5, dtype=dtype).expand(2, -1, -1)
    check(basis.turned(P), 40, tolerance)


@DTYPES
def test_so_do_factors_that_grow(dtype, tolerance):
    check(resized(started(dtype), R + 4).U, 40, tolerance)


@DTYPES
def test_so_do_explored_directions(dtype, tolerance):
    U, G = started(dtype).U, rows(40, N, dtype)
    test = torch.linalg.qr(torch.randn(2, N, R + 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    [found] = directions([Look(U, G @ test.to(dtype), test.to(dtype))])
    assert found.any() and not found[:, 40:].any()


@DTYPES
def test_where_too_few_came_the_basis_is_whole_all_the_same(dtype, tolerance):
    """Four rows hold no six columns: the others are filled, without momentum."""
    factors = started(dtype, live=4)
    assert max(departure_from_orthonormal(one) for one in factors.U) < tolerance
    assert factors.U[:, 4:].any()
    G = rows(4, N, dtype)
    [new] = update_many([(factors, G @ factors.V, G.mT @ factors.U)], beta=0.9, gamma=1.0)
    assert isinstance(new, Factors)
    assert max(departure_from_orthonormal(one) for one in new.U) < tolerance
