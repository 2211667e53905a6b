"""Numbers that go wrong on one rank: every rank decides the same, it is counted and logged, and nothing is poisoned."""

import contextlib
import logging
from unittest import mock

import torch
from comparing import assert_same, dense, distances
from deepspeed import comm as dist
from launching import on_ranks
from torch import nn
from toys import SEQUENCES, VOCABULARY, WIDTH, Sometimes, batches, micro_batches
from training import config, engine_for, matrices_of, toy, train, train_step, whole_momenta, whole_weights

STEPS = 5


@contextlib.contextmanager
def logged():
    """The lines that the optimizer logs on this rank."""
    lines, handler, logger = [], logging.Handler(), logging.getLogger("ds_mofa")
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


# ------------------------------------------------------------------ an SVD that does not converge


def svd_fails(stage: int, rank: int, number: int, dtype: str = "fp32") -> dict:
    """Five steps; in one of them the SVD raises on one rank."""
    svd = torch.linalg.svd

    def fail(*args, **kwargs):
        if dist.get_rank() == rank:
            raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
        return svd(*args, **kwargs)

    with engine_for(config(stage, dtype=dtype)) as engine, logged() as lines:
        for i, batch in enumerate(batches(STEPS)):
            if i != number:
                train_step(engine, batch)
                continue
            before = matrices_of(engine)
            with mock.patch("torch.linalg.svd", fail):
                train_step(engine, batch)
            after = matrices_of(engine)
        end = matrices_of(engine)
        return {"before": before, "after": after, "end": end, "lines": lines, "skipped": engine.skipped_steps}


@on_ranks(svd_fails, stage=[0, 1, 2, 3], rank=[0, 1], number=[2])
def test_an_svd_that_fails_on_one_rank_leaves_the_matrices_of_all_as_they_were(ran):
    assert_left_alone(ran)


@on_ranks(svd_fails, stage=[0, 3], rank=[0, 1], number=[0])
def test_an_svd_that_fails_in_the_first_step_leaves_the_start_to_the_next(ran):
    assert_left_alone(ran)


@on_ranks(svd_fails, stage=[2], rank=[0, 1], number=[2], dtype=["bf16"])
def test_an_svd_that_fails_leaves_16_bit_copies_as_they_were(ran):
    assert_left_alone(ran)


def assert_left_alone(ran) -> None:
    for rank, result in enumerate(ran.ranks):
        before, after, end = result["before"], result["after"], result["end"]
        assert before["steps"] == after["steps"] == ran.number and end["steps"] == STEPS - 1
        for kind in ("weights", "momenta"):
            for name, value in before[kind].items():
                assert torch.equal(value, after[kind][name]), f"{kind} of {name} moved"
        assert torch.equal(before["working"], after["working"])
        for name, value in end["weights"].items():  # and goes on, the same on every rank
            assert torch.isfinite(value).all()
            assert torch.equal(value, ran.ranks[0]["end"]["weights"][name])
            assert not torch.equal(value, after["weights"][name])
        skips = [line for line in result["lines"] if "step skipped" in line]
        assert len(skips) == (rank == 0)
        if rank == 0:
            assert "on every rank, 1 so far: an SVD has not converged" in skips[0] and 'lower "lr"' in skips[0]
        assert any("failed to converge" in line for line in result["lines"]) == (rank == ran.rank)


# ------------------------------------------------------------------ a loss that jumps


def spike(stage: int, rank: int, size: float, clip: float) -> dict:
    """Eight steps; in the third one rank's loss is ``size`` times too large."""
    with engine_for(config(stage, gradient_clipping=clip)) as engine, logged() as lines:
        losses = []
        for number, batch in enumerate(batches(8)):
            if number == 2:
                (part,) = micro_batches(batch, dist.get_rank(), dist.get_world_size(), 1)
                engine.backward(engine(*part) * (size if dist.get_rank() == rank else 1.0))
                engine.step()
            else:
                losses.append(train_step(engine, batch))
        step = engine.basic_optimizer.matrices
        return {
            "losses": losses,
            "weights": whole_weights(engine.module),
            "momenta": whole_momenta(engine),
            "steps": (step.steps, step.skipped),
            "lines": lines,
        }


@on_ranks(spike, {"size": 1e4, "clip": 0.0, "rank": 0}, {"size": 1e12, "clip": 1.0, "rank": 1}, stage=[0, 2, 3])
def test_a_spike_is_a_step_of_the_usual_size(ran):
    """The update is orthonormal whatever the gradient's size."""
    assert_recovered(ran)
    for result in ran.ranks:
        assert result["steps"] == (8, 0)


@on_ranks(spike, {"clip": 0.0, "rank": 0}, {"clip": 1.0, "rank": 1}, stage=[0, 1, 2, 3], size=[1e30])
def test_a_spike_whose_squares_overflow_is_left_out_by_all(ran):
    assert_recovered(ran)
    for rank, result in enumerate(ran.ranks):
        assert result["steps"] == (7, 1)
        assert len(result["lines"]) == (rank == 0)
        assert all(
            "1 so far: the gradient holds a NaN or Inf, or its norm is above 1e+18" in x for x in result["lines"]
        )


def assert_recovered(ran) -> None:
    for result in ran.ranks:
        assert result["losses"][-1] < result["losses"][0] - 0.1, result["losses"]
        for kind in ("weights", "momenta"):
            for name, value in result[kind].items():
                assert torch.isfinite(value).all(), name
        for name, value in result["weights"].items():
            assert torch.equal(value, ran.ranks[0]["weights"][name])


# ------------------------------------------------------------------ a NaN that no sketch has seen


def nan_for_adamw(stage: int, rank: int) -> dict:
    """Four steps; in the third a NaN in a LayerNorm's gradient on one rank, which spoils the norm to clip by."""
    model = toy()
    with engine_for(config(stage, gradient_clipping=0.5), model=model) as engine:
        for number, batch in enumerate(batches(4)):
            bad = number == 2 and dist.get_rank() == rank
            handle = model.norm.weight.register_hook(lambda grad, by=float("nan") if bad else 1.0: grad * by)
            train_step(engine, batch)
            handle.remove()
        return matrices_of(engine)


@on_ranks(nan_for_adamw, {"stage": 0, "rank": 0}, {"stage": 2, "rank": 1}, {"stage": 3, "rank": 0})
def test_a_nan_among_adamws_gradients_does_not_reach_the_matrices(ran):
    for result in ran.ranks:
        assert torch.isfinite(result["working"]).all()
        for name, value in result["weights"].items():
            assert torch.isfinite(value).all() and torch.equal(value, ran.ranks[0]["weights"][name])
    assert all(torch.isfinite(value).all() for value in ran.ranks[0]["momenta"].values())


# ------------------------------------------------------------------ gradients of zero, and of one direction


def always_odd(steps: int) -> list:
    """Batches none of whose sequences goes through ``Sometimes.spare``."""
    return [(tokens.clone().index_fill_(1, torch.tensor([0]), 1), targets) for tokens, targets in batches(steps)]


def idle(stage: int, trained: int) -> dict:
    """Steps in which a matrix has no gradient at all, with ``trained`` ordinary ones before them and two behind."""
    model = toy(Sometimes)
    with engine_for(config(stage, options={"weight_decay": 0.0}), model=model) as engine:
        for batch in batches(trained):
            train_step(engine, batch)
        start = whole_weights(model)["spare.weight"]
        for batch in always_odd(25):
            train_step(engine, batch)
        idle, factors = whole_weights(model)["spare.weight"], factors_of(engine)
        for batch in batches(2):
            train_step(engine, batch)
        return {"start": start, "idle": idle, "end": whole_weights(model)["spare.weight"], "factors": factors}


def factors_of(engine) -> dict:
    return engine.basic_optimizer.matrices.state_dict().get("matrices", {})


def one_direction(steps: int) -> list:
    """Batches of one token: the gradient of every matrix has rank one, less than the factors'."""
    tokens = torch.full((SEQUENCES, 6), 3)
    return [(tokens, (5 * tokens + 3) % VOCABULARY)] * steps


def deficient(stage: int) -> dict:
    def look(engine):
        return factors_of(engine)

    return train(config(stage), STEPS, data=one_direction(STEPS + 1), look=look)


def assert_orthonormal(factors: dict, tolerance: float = 1e-5) -> None:
    for name, one in factors.items():
        for side in ("U", "V"):
            gram = one[side].double().mT @ one[side].double()
            assert float((gram - torch.eye(len(gram))).abs().max()) < tolerance, (name, side)


@on_ranks(idle, stage=[0, 3], trained=[0, 3])
def test_a_matrix_without_a_gradient_for_long_is_not_harmed(ran):
    for result in ran.ranks:
        assert torch.isfinite(result["end"]).all()
        assert torch.equal(result["end"], ran.ranks[0]["end"])
        if ran.trained == 0:  # no gradient yet: no momentum, and the weights stay
            assert torch.equal(result["idle"], result["start"])
        assert not torch.equal(result["end"], result["idle"])  # and it learns as soon as there is one
    assert_orthonormal(ran.ranks[0]["factors"])
    assert ran.ranks[0]["factors"]


@on_ranks(deficient, stage=[0, 1, 2, 3])
def test_a_gradient_of_less_than_the_factors_rank_is_the_dense_one(ran):
    # In losses and momenta. Which direction of the order of fp32's rounding still counts as live is not the
    # float64 reference's to say, and each that does moves the weights.
    wanted = dense(data=one_direction)
    for result in ran.ranks:
        far = distances(result, wanted)
        assert far["losses"] < 1e-4 and far["momenta"] < 5e-3, far
        assert all(torch.isfinite(value).all() for value in result["weights"].values())
    factors = ran.ranks[0]["seen"]
    assert_orthonormal(factors)
    assert any(float(one["sigma"][-1]) < 1e-4 * float(one["sigma"][0]) for one in factors.values())


# ------------------------------------------------------------------ more ranks than matrices


class Lone(nn.Module):
    MATRICES = ["only.weight"]

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.only = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens, targets):
        x = self.head(torch.tanh(self.only(self.embed(tokens))))
        return nn.functional.cross_entropy(x.flatten(0, -2).float(), targets.flatten())


def lone(stage: int) -> dict:
    return train(config(stage), STEPS, model=toy(Lone))


@on_ranks(lone, stage=[0, 1, 2, 3])
def test_a_rank_that_owns_no_matrix_takes_part(ran):
    assert_same(ran, dense(Lone))
