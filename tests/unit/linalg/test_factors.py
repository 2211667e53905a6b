"""The factor update against the dense truncated SVD, on the gradients that break factorised methods."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_mofa.linalg.factors import (
    Factors,
    gram_matrices,
    live_directions,
    projected_norm,
    resized,
    start_factors,
    update_factors,
    update_many,
)
from ds_mofa.linalg.orthonormal import Side, complements
from tests.unit.dense_reference import (
    dense,
    departure_from_orthonormal,
    next_momentum,
    random_factors,
    random_orthonormal,
    relative_error,
    sketches,
    tangent_projection,
    truncated,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp64", "fp32"])
EXAMPLES = settings(max_examples=60)
# Of a momentum times 1e-308 fp32 has nothing left, and the float64 reference has.
BETAS = st.just(0.0) | st.floats(1e-6, 0.99)


def _normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _of_rank(k):
    def gradient(factors, generator):
        m, n = factors.U.shape[-2], factors.V.shape[-2]
        return _normal(m, k, generator=generator) @ _normal(k, n, generator=generator)

    return gradient


def _generic(factors, generator):
    return _normal(factors.U.shape[-2], factors.V.shape[-2], generator=generator)


def _ill_conditioned(factors, generator):
    m, n = factors.U.shape[-2], factors.V.shape[-2]
    k = min(m, n)
    spectrum = torch.logspace(0, -9, k, dtype=torch.float64)
    return random_orthonormal(m, k, generator) * spectrum @ random_orthonormal(n, k, generator).mT


def _seen_by_one_direction(factors, generator):
    # Every column of Y = G V but one is zero, and that one is not the first.
    u = _normal(factors.U.shape[-2], 1, generator=generator)
    return u @ factors.V[0][:, -1:].mT


def _seen_twice_alike(factors, generator):
    # Y's columns come in equal pairs.
    r = factors.V.shape[-1]
    Y = _normal(factors.U.shape[-2], r, generator=generator)
    Y[:, 1::2] = Y[:, : 2 * (r // 2) : 2]
    return Y @ factors.V[0].mT


def _few_rows(factors, generator):
    # A sparse gradient: what an embedding or a gate that hardly ever opens gets.
    G = torch.zeros(factors.U.shape[-2], factors.V.shape[-2], dtype=torch.float64)
    G[:2] = _normal(*G[:2].shape, generator=generator)
    return G


GRADIENTS = {
    "generic": _generic,
    "rank 1": _of_rank(1),
    "rank 2": _of_rank(2),
    "zero": lambda f, g: 0 * _generic(f, g),
    "ill-conditioned": _ill_conditioned,
    "times 1e8": lambda f, g: 1e8 * _generic(f, g),
    "times 1e-8": lambda f, g: 1e-8 * _generic(f, g),
    "inside span U": lambda f, g: f.U[0] @ f.U[0].mT @ _generic(f, g),
    "inside span V": lambda f, g: _generic(f, g) @ f.V[0] @ f.V[0].mT,
    "inside both": lambda f, g: f.U[0] @ f.U[0].mT @ _generic(f, g) @ f.V[0] @ f.V[0].mT,
    "outside both": lambda f, g: _generic(f, g) - tangent_projection(f.U[0], f.V[0], _generic(f, g)),
    "against the momentum": lambda f, g: -dense(f)[0],
    "seen by one direction": _seen_by_one_direction,
    "seen twice alike": _seen_twice_alike,
    "few rows": _few_rows,
}
MOMENTA = {
    "generic": lambda f: f,
    "zero": lambda f: f._replace(sigma=0 * f.sigma),
    "rank 1": lambda f: f._replace(sigma=f.sigma * (f.sigma == f.sigma[..., :1])),
    "tiny": lambda f: f._replace(sigma=1e-12 * f.sigma),
    "flat": lambda f: f._replace(sigma=torch.ones_like(f.sigma)),
}
SHAPES = {
    "wide": (9, 23, 3),
    "tall": (24, 10, 4),
    "m < 2r": (7, 16, 5),
    "m, n < 2r": (6, 7, 5),
    "r = m": (4, 9, 4),
    "r = m = n": (5, 5, 5),
    "r = 1": (6, 8, 1),
    "m = 1": (1, 8, 1),
    "m = n = 1": (1, 1, 1),
}


def _assert_is_truncated_svd(new: Factors, M: torch.Tensor, tolerance: float) -> None:
    """U, sigma, V are the leading singular triplets of M. Holds whatever the gaps between singular values."""
    scale = float(torch.linalg.matrix_norm(M, 2).max())
    U, sigma, V = (part.double() for part in new)
    r = sigma.shape[-1]
    assert departure_from_orthonormal(U) < tolerance
    assert departure_from_orthonormal(V) < tolerance
    assert (sigma >= 0).all() and (sigma.diff() <= 0).all()
    assert float((sigma - torch.linalg.svdvals(M)[..., :r]).abs().max()) <= tolerance * scale
    assert float((M @ V - U * sigma.unsqueeze(-2)).abs().max()) <= tolerance * scale
    assert float((M.mT @ U - V * sigma.unsqueeze(-2)).abs().max()) <= tolerance * scale


def _assert_update_is_exact(factors, G, beta, gamma, dtype):
    factors, G = Factors(*(part.to(dtype) for part in factors)), G.to(dtype)
    Y, Z = sketches(factors, G)
    new = update_factors(factors, Y, Z, beta=beta, gamma=gamma)
    assert all(part.dtype == dtype for part in new)
    _assert_is_truncated_svd(new, next_momentum(factors, G, beta, gamma), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_update_is_the_truncated_svd_of_momentum_plus_projected_gradient(gradient, shape, dtype):
    m, n, r = shape
    for seed, momentum in enumerate(MOMENTA.values()):
        generator = torch.Generator().manual_seed(seed)
        factors = momentum(random_factors(m, n, r, generator))
        G = GRADIENTS[gradient](factors, generator)[None]
        _assert_update_is_exact(factors, G, 0.85, 0.15, dtype)


@DTYPES
@EXAMPLES
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    rank=st.floats(0, 1),
    gradient=st.sampled_from(list(GRADIENTS)),
    momentum=st.sampled_from(list(MOMENTA)),
    beta=BETAS,
    heavy_ball=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_update_is_exact_for_any_shape_gradient_and_momentum(
    dtype, m, n, rank, gradient, momentum, beta, heavy_ball, seed
):
    r = 1 + round(rank * (min(m, n) - 1))
    generator = torch.Generator().manual_seed(seed)
    factors = MOMENTA[momentum](random_factors(m, n, r, generator))
    G = GRADIENTS[gradient](factors, generator)[None]
    _assert_update_is_exact(factors, G, beta, 1.0 if heavy_ball else 1 - beta, dtype)


@DTYPES
def test_factors_stay_orthonormal_and_exact_over_hundreds_of_steps(dtype):
    generator = torch.Generator().manual_seed(0)
    m, n, r = 24, 13, 6
    factors = Factors(*(part.to(dtype) for part in random_factors(m, n, r, generator)))
    kinds = list(GRADIENTS.values())
    for step in range(400):
        # Not 1e8: after it fp32 has forgotten everything that came before, and so has the reference.
        G = kinds[step % len(kinds)](Factors(*(part.double() for part in factors)), generator)[None]
        G = (G / G.norm().clamp_min(1e-30) * 10 ** math.sin(step)).to(dtype)
        M = next_momentum(factors, G, 0.9, 0.1)
        factors = update_factors(factors, *sketches(factors, G), beta=0.9, gamma=0.1)
        if step % 20 == 19:
            _assert_is_truncated_svd(factors, M, TOLERANCE[dtype])
            # Nothing adds up: what is there is one step's rounding. In fp32, where the work is done in float64, that of the
            # result, 0.6 eps over four seeds; in float64 also that of the work, 4 to 5.5.
            bound = (1 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
            assert departure_from_orthonormal(factors.U) < bound
            assert departure_from_orthonormal(factors.V) < bound


@pytest.mark.parametrize("rank", [1, 2, 6], ids="rank {}".format)
@pytest.mark.parametrize("m, n, r", [(6, 12, 4), (12, 6, 4), (6, 6, 4), (12, 40, 8), (48, 64, 32)])
@DTYPES
def test_updates_after_a_start_are_exact_where_the_rows_are_one_and_a_half_times_the_rank(m, n, r, rank, dtype):
    """The start fills U up with as many columns as the complement of U has, which must not be made of the same ones."""
    generator = torch.Generator().manual_seed(0)
    G = _of_rank(rank)(random_factors(m, n, r, generator), generator)
    psi, omega = (_normal(1, rows, r, generator=generator) for rows in (m, n))
    factors = start_factors(*(x.to(dtype) for x in (G @ omega, G.mT @ psi, psi)), gamma=0.15)
    for _ in range(8):
        G = _of_rank(rank)(factors, generator)
        wanted = truncated(next_momentum(factors, G, 0.85, 0.15), r)
        Y, Z = sketches(Factors(*(part.double() for part in factors)), G)
        factors = update_factors(factors, Y.to(dtype), Z.to(dtype), beta=0.85, gamma=0.15)
        assert relative_error(dense(factors), wanted) < TOLERANCE[dtype]
        assert departure_from_orthonormal(factors.U) < TOLERANCE[dtype]
        assert departure_from_orthonormal(factors.V) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_nothing_moves_where_there_is_neither_momentum_nor_gradient(shape, dtype):
    m, n, r = shape
    factors = MOMENTA["zero"](random_factors(m, n, r, torch.Generator().manual_seed(0)))
    factors = Factors(*(part.to(dtype) for part in factors))
    once = update_factors(factors, *sketches(factors, torch.zeros(1, m, n, dtype=dtype)), beta=0.9, gamma=0.1)
    many = once
    for _ in range(50):
        many = update_factors(many, *sketches(many, torch.zeros(1, m, n, dtype=dtype)), beta=0.9, gamma=0.1)
    for before, after, later in zip(factors, once, many):
        assert torch.equal(after, before) and torch.equal(later, before)


@EXAMPLES
@given(log_scale=st.floats(-8, 8), momentum=st.booleans(), seed=st.integers(0, 2**32))
def test_spectral_direction_does_not_feel_the_scale_of_the_loss(log_scale, momentum, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = random_factors(12, 9, 3, generator)
    if not momentum:
        factors = MOMENTA["zero"](factors)
    G, scale = _generic(factors, generator)[None], 10**log_scale
    scaled = factors._replace(sigma=scale * factors.sigma)
    one = update_factors(factors, *sketches(factors, G), beta=0.8, gamma=0.2)
    other = update_factors(scaled, *sketches(scaled, scale * G), beta=0.8, gamma=0.2)
    assert relative_error(other.U @ other.V.mT, one.U @ one.V.mT) < 1e-9
    assert relative_error(other.sigma, scale * one.sigma) < 1e-12


def test_average_and_heavy_ball_give_the_same_direction():
    generator = torch.Generator().manual_seed(1)
    average = heavy = MOMENTA["zero"](random_factors(14, 11, 4, generator))
    for _ in range(8):
        G = _generic(average, generator)[None]
        average = update_factors(average, *sketches(average, G), beta=0.8, gamma=0.2)
        heavy = update_factors(heavy, *sketches(heavy, G), beta=0.8, gamma=1.0)
        assert relative_error(heavy.U @ heavy.V.mT, average.U @ average.V.mT) < 1e-9
        assert relative_error(heavy.sigma, 5 * average.sigma) < 1e-11


def test_decayed_momentum_alone_keeps_its_directions():
    factors = random_factors(14, 11, 4, torch.Generator().manual_seed(1))
    new = update_factors(factors, *sketches(factors, torch.zeros(1, 14, 11).double()), beta=0.8, gamma=0.2)
    assert relative_error(dense(new), 0.8 * dense(factors)) < 1e-14


@DTYPES
def test_a_batch_equals_its_matrices_one_by_one(dtype):
    generator = torch.Generator().manual_seed(2)
    many, gradients = [], []
    for gradient in GRADIENTS.values():
        factors = random_factors(12, 10, 4, generator)
        gradients.append(gradient(factors, generator).to(dtype))
        many.append(Factors(*(part[0].to(dtype) for part in factors)))
    batch, G = Factors(*map(torch.stack, zip(*many))), torch.stack(gradients)
    together = update_factors(batch, *sketches(batch, G), beta=0.9, gamma=0.1)
    for i in range(len(many)):
        alone = Factors(*(part[i : i + 1] for part in batch))
        alone = update_factors(alone, *sketches(alone, G[i : i + 1]), beta=0.9, gamma=0.1)
        size = float(alone.sigma.max())
        error = dense(Factors(*(part[i : i + 1] for part in together))) - dense(alone)
        assert float(error.norm()) <= TOLERANCE[dtype] * size


@DTYPES
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_projected_norm_from_the_sketches_is_that_of_the_dense_projection(gradient, dtype):
    generator = torch.Generator().manual_seed(3)
    factors = random_factors(15, 11, 4, generator)
    G = GRADIENTS[gradient](factors, generator)[None]
    expected = tangent_projection(factors.U, factors.V, G).square().sum()
    factors, G = Factors(*(part.to(dtype) for part in factors)), G.to(dtype)
    Y, Z = sketches(factors, G)
    square = projected_norm(*gram_matrices(factors, Y, Z))
    assert square.shape == (1,) and square >= 0
    # A gradient outside both spans leaves only rounding, so the unit is the gradient's own norm.
    assert abs(float(square - expected)) <= TOLERANCE[dtype] * float(G.double().square().sum())


@EXAMPLES
@given(
    m=st.integers(2, 20),
    n=st.integers(2, 20),
    gradient=st.sampled_from(list(GRADIENTS)),
    seed=st.integers(0, 2**32),
)
def test_tangent_projection_loses_least(m, n, gradient, seed):
    """Theorem 4.3 of the paper: less of G is lost than by projecting from the left, from the right, or from both."""
    generator = torch.Generator().manual_seed(seed)
    factors = random_factors(m, n, max(1, min(m, n) // 2), generator)
    G = GRADIENTS[gradient](factors, generator)
    U, V = factors.U[0], factors.V[0]
    left, right = U @ U.mT, V @ V.mT
    lost = float((G - tangent_projection(U, V, G)).norm())
    rounding = 1e-14 * float(G.norm())
    for other in (left @ G, G @ right, left @ G @ right):
        assert lost <= float((G - other).norm()) + rounding
    # and what the sketches keep is G's best approximation among the tangent vectors: the residual is normal to them
    kept = tangent_projection(U, V, G)
    assert abs(float(((G - kept) * kept).sum())) <= 1e-13 * float(G.square().sum())


# ---------------------------------------------------------------------- the new directions alone


def orthonormal_complement(U, Y):
    """Q (B, m, k) and R (B, k, r) with Y = U U^T Y + Q R, written out."""
    [basis] = complements([Side(U, Y)])
    c, k = U.shape[-1], basis.rough.shape[-1]
    return basis.turned(torch.eye(c + k)[:, c:].expand(len(U), -1, -1)), basis.R


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_complement_holds_all_that_is_new_and_nothing_old(gradient, shape, dtype):
    m, n, r = shape
    generator = torch.Generator().manual_seed(4)
    factors = random_factors(m, n, r, generator)
    Y = (GRADIENTS[gradient](factors, generator)[None] @ factors.V).to(dtype)
    U = factors.U.to(dtype)
    Q, R = orthonormal_complement(U, Y)
    assert Q.shape == (1, m, min(r, m - r)) and R.shape == (1, min(r, m - r), r)
    assert departure_from_orthonormal(torch.cat([U, Q], dim=-1)) < TOLERANCE[dtype]
    rebuilt = U.double() @ (U.double().mT @ Y.double()) + Q.double() @ R.double()
    assert float((rebuilt - Y.double()).norm()) <= TOLERANCE[dtype] * float(Y.double().norm())


def test_sides_of_all_sizes_are_orthonormalised_together():
    generator = torch.Generator().manual_seed(0)
    sides = []
    for batch, m, c, k in ((2, 30, 4, 4), (1, 7, 4, 4), (3, 30, 4, 4), (2, 9, 0, 5), (1, 4, 4, 4)):
        U = random_orthonormal(m, c, generator).expand(batch, -1, -1).float()
        sides.append(Side(U, torch.randn(batch, m, k, generator=generator)))
    for (U, X, _), basis in zip(sides, complements(sides)):
        [alone] = complements([Side(U, X)])
        both = min(U.shape[-1] + X.shape[-1], X.shape[-2])
        eye = torch.eye(both).expand(len(X), -1, -1)
        assert basis.turned(eye).shape == (len(X), X.shape[-2], both)
        assert float((basis.turned(eye) - alone.turned(eye)).abs().max()) < 1e-5
        assert departure_from_orthonormal(basis.turned(eye)) < 1e-5
        assert relative_error(basis.R, basis.turned(eye)[..., U.shape[-1] :].mT @ X) < 1e-5 or both == U.shape[-1]


def test_batches_of_several_shapes_are_updated_as_each_alone():
    generator = torch.Generator().manual_seed(0)
    batches = []
    for m, n in ((24, 10), (10, 24), (6, 30), (24, 10)):
        factors = Factors(*(x.float() for x in random_factors(m, n, 4, generator)))
        batches.append((factors, *sketches(factors, torch.randn(1, m, n, generator=generator))))
    together = update_many(batches, beta=0.8, gamma=torch.tensor(0.2))
    for batch, new in zip(batches, together):
        alone = update_factors(*batch, beta=0.8, gamma=0.2)
        assert relative_error(dense(new)[0], dense(alone)[0]) < 1e-5


# ---------------------------------------------------------------------- the first step


def _start(G, r, dtype=torch.float64, gamma=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    G = G.to(dtype)
    omega = torch.randn(G.shape[0], G.shape[-1], r, generator=generator, dtype=torch.float64).to(dtype) / math.sqrt(r)
    psi = torch.randn(G.shape[0], G.shape[-2], r, generator=generator, dtype=torch.float64).to(dtype) / math.sqrt(r)
    return start_factors(G @ omega, G.mT @ psi, psi, gamma=gamma)


@DTYPES
@pytest.mark.parametrize("r", [1, 2, 3, 8])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_start_recovers_a_gradient_of_half_the_rank(r, scale, dtype):
    generator = torch.Generator().manual_seed(5)
    c = (r + 1) // 2
    G = scale * random_orthonormal(20, c, generator) @ random_orthonormal(14, c, generator).mT[None]
    for seed in range(5):
        # The random test matrices' own conditioning, 1e2 or so, is all that stands between this and rounding.
        new = _start(G, r, dtype, gamma=0.15, seed=seed)
        assert relative_error(dense(new), 0.15 * G) < 100 * TOLERANCE[dtype]
        assert departure_from_orthonormal(new.U) < TOLERANCE[dtype]
        assert departure_from_orthonormal(new.V) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_start_is_orthonormal_and_descending_for_every_gradient(gradient, shape, dtype):
    m, n, r = shape
    generator = torch.Generator().manual_seed(6)
    G = GRADIENTS[gradient](random_factors(m, n, r, generator), generator)[None]
    new = _start(G, r, dtype)
    assert new.U.shape == (1, m, r) and new.sigma.shape == (1, r) and new.V.shape == (1, n, r)
    assert departure_from_orthonormal(new.U) < TOLERANCE[dtype]
    assert departure_from_orthonormal(new.V) < TOLERANCE[dtype]
    assert (new.sigma >= 0).all() and (new.sigma.diff() <= 0).all()
    assert (new.sigma[..., (r + 1) // 2 :] == 0).all()
    assert torch.isfinite(new.sigma).all()


@pytest.mark.parametrize("decay", ["like 1/i", "like 1/i^2", "slow geometric", "fast geometric"])
def test_start_is_within_a_small_factor_of_the_best_of_half_the_rank(decay):
    """In the mean over the random test matrices at most 2.5 times the error of the best rank-c matrix."""
    generator = torch.Generator().manual_seed(7)
    m, n, r = 48, 40, 8
    i = torch.arange(1, n + 1, dtype=torch.float64)
    spectrum = {"like 1/i": 1 / i, "like 1/i^2": 1 / i**2, "slow geometric": 0.7**i, "fast geometric": 0.3**i}[decay]
    G = (random_orthonormal(m, n, generator) * spectrum @ random_orthonormal(n, n, generator).mT)[None]
    best = float((G - truncated(G, 4)).norm())
    errors = [float((G - dense(_start(G, r, seed=seed))).norm()) for seed in range(40)]
    assert sum(errors) / len(errors) < 2.5 * best
    assert min(errors) >= best * (1 - 1e-12)  # nothing of rank c can be better


def test_start_of_a_zero_gradient_has_no_live_direction():
    new = _start(torch.zeros(1, 9, 7), 4)
    assert (new.sigma == 0).all() and (live_directions(new.sigma) == 0).all()


# ---------------------------------------------------------------------- live directions, reproducibility


@DTYPES
def test_live_directions_are_those_above_rounding(dtype):
    eps = torch.finfo(dtype).eps
    sigma = torch.tensor([[1, 1e-3, 100 * eps, 4 * eps, 0], [5, 5, 5, 5, 5], [0] * 5], dtype=dtype)
    expected = torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0] * 5], dtype=dtype)
    assert torch.equal(live_directions(sigma), expected)
    assert torch.equal(live_directions(1e-20 * sigma), expected)


@DTYPES
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_live_directions_count_the_rank_of_what_came_in(k, dtype):
    generator = torch.Generator().manual_seed(8)
    factors = MOMENTA["zero"](random_factors(16, 12, 4, generator))
    factors = Factors(*(part.to(dtype) for part in factors))
    # In the projection a gradient of rank k gives a matrix of rank 2k, unless it lies in one of the spans.
    G = (factors.U.double() @ _normal(1, 4, k, generator=generator) @ _normal(1, k, 12, generator=generator)).to(dtype)
    new = update_factors(factors, *sketches(factors, G), beta=0.9, gamma=0.1)
    assert live_directions(new.sigma).sum() == k


def test_factors_do_not_depend_on_the_global_random_state_nor_move_it():
    generator = torch.Generator().manual_seed(9)
    factors = random_factors(12, 9, 4, generator)
    G = _of_rank(1)(factors, generator)[None]
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(
            [
                *update_factors(factors, *sketches(factors, G), beta=0.9, gamma=0.1),
                *start_factors(*sketches(factors, G), factors.U, gamma=0.1),
                *orthonormal_complement(factors.U, 0 * factors.U),
            ]
        )
        assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, *results))


# ---------------------------------------------------------------------- another rank


@DTYPES
@pytest.mark.parametrize("m, n, before, after", [(40, 30, 8, 3), (33, 50, 32, 8), (12, 12, 12, 1)])
def test_truncated_factors_are_the_truncated_svd_of_the_momentum(dtype, m, n, before, after):
    factors = Factors(*(x.to(dtype) for x in random_factors(m, n, before, torch.Generator().manual_seed(m))))
    smaller = resized(factors, after)
    assert relative_error(dense(smaller), truncated(dense(factors), after)) < TOLERANCE[dtype]
    assert smaller.U.shape == (1, m, after) and smaller.V.shape == (1, n, after) and smaller.sigma.shape == (1, after)
    assert departure_from_orthonormal(smaller.U[0]) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("m, n, before, after", [(40, 30, 3, 8), (33, 50, 8, 32), (12, 40, 5, 12), (12, 12, 1, 12)])
def test_grown_factors_are_the_same_momentum_with_dead_directions_beside_it(dtype, m, n, before, after):
    factors = Factors(*(x.to(dtype) for x in random_factors(m, n, before, torch.Generator().manual_seed(m))))
    grown = resized(factors, after)
    for old, new in ((factors.U, grown.U), (factors.V, grown.V), (factors.sigma, grown.sigma)):
        assert new.dtype == dtype
        assert torch.equal(new[..., :before], old)
    assert live_directions(grown.sigma)[0].tolist() == [1.0] * before + [0.0] * (after - before)
    for basis in (grown.U[0], grown.V[0]):
        assert departure_from_orthonormal(basis) < (1e-13 if dtype == torch.float64 else 1e-6)
    back = resized(grown, before)
    assert all(torch.equal(a, b) for a, b in zip(back, factors))


def test_growing_changes_the_next_update_by_what_the_added_directions_see_alone():
    """Seen through the old factors, the update is the one that they would have made."""
    generator = torch.Generator().manual_seed(0)
    factors, G = random_factors(40, 30, 3, generator), _normal(1, 40, 30, generator=generator)
    G = truncated(G, 2)  # the next momentum has at most rank 3 + 2 * 2: nothing of it is truncated at 12
    grown = resized(factors, 12)
    updated = update_factors(grown, *sketches(grown, G), beta=0.85, gamma=0.15)
    difference = dense(updated) - next_momentum(factors, G, 0.85, 0.15)
    assert difference.norm() > 1e-2, "the added directions see nothing"
    assert tangent_projection(factors.U, factors.V, difference).norm() < 1e-12 * difference.norm()
    assert relative_error(dense(updated), next_momentum(grown, G, 0.85, 0.15)) < 1e-12
