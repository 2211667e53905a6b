"""Exploring on real ranks: every stage and world size like the dense reference, offloaded, saved and resumed."""

from collections import Counter

import pytest
import torch
from comparing import STEPS, assert_same, dense, distances, equal
from launching import cases, on_ranks
from reference import random_columns
from scenes.collectives import watched
from scenes.elastic import assert_continued, resumed, saved
from scenes.resuming import saved_and_resumed
from toys import Toy, batches
from training import OPTIONS, config, engine_for, train, train_step

K = 3
EXPLORING = {"explore": K, "explore_scale": 2.0}
ALL_AT_ONCE = {"micro": 3, "clip": 0.2, "balance": 0.5}
CPU = {"device": "cpu", "pin_memory": False}


def explored(stage: int, micro: int = 1, clip: float = 0.0, dtype: str = "fp32", **options) -> dict:
    settings = config(stage, dtype=dtype, micro=micro, gradient_clipping=clip, options={**EXPLORING, **options})
    return train(settings, STEPS)


def drawn(stage: int) -> dict:
    """The working copies of every matrix after two steps: the same on every rank, and in every world."""
    with engine_for(config(stage, options=EXPLORING)) as engine:
        for batch in batches(2):
            train_step(engine, batch)
        step = engine.basic_optimizer.matrices
        views = [step.layout.views(step.working, index)[:2] for index in range(len(step.members))]
        return {"columns": [view[:, OPTIONS["rank"] :].clone() for pair in views for view in pair]}


def offloaded(stage: int, dtype: str) -> dict:
    """The same training with all on the device, and with all that can be on the host."""
    places = [
        {},
        {"offload_optimizer": CPU},
        *([{"offload_optimizer": CPU, "offload_param": CPU}] if stage == 3 else []),
    ]
    ends = []
    for where in places:
        options = {
            **EXPLORING,
            "balance": 0.5,
            "update_bytes": 1,
            "diagnostics_every": 1,
            "master_weights": dtype == "bf16",
        }
        settings = config(
            stage, dtype=dtype, options=options, zero_optimization=where, zero_force_ds_cpu_optimizer=False
        )
        ends.append(train(settings, STEPS, look=lambda engine: engine.basic_optimizer.matrices.report.values))
    return {"ends": ends}


def sent(stage: int) -> dict:
    with engine_for(config(stage, micro=3, options=EXPLORING)) as engine:
        first, second = batches(2)
        train_step(engine, first)
        with watched() as calls:
            train_step(engine, second)
        return {"calls": calls, "buffer": engine.basic_optimizer.matrices.layout.numel}


@on_ranks(explored, ALL_AT_ONCE, stage=[0, 1, 2, 3])
def test_agrees_with_the_dense_reference(ran):
    assert_all_at_once(ran)


@pytest.mark.slow
@on_ranks(explored, ALL_AT_ONCE, world=[1, 3], stage=[0, 1, 2, 3])
def test_so_it_does_on_one_rank_and_on_three(ran):
    assert_all_at_once(ran)


def assert_all_at_once(ran) -> None:
    assert_same(ran, dense(**EXPLORING, balance=0.5, clip=0.2))
    with pytest.raises(AssertionError):
        assert_same(ran, dense(balance=0.5, clip=0.2))


@on_ranks(explored, {"capture": "hook", "update_bytes": 1}, stage=[3])
def test_agrees_where_gradients_are_sketched_by_hooks(ran):
    assert_same(ran, dense(**EXPLORING))


@on_ranks(explored, *({"stage": s, "dtype": d} for s, d in ((0, "bf16"), (3, "bf16"), (2, "fp16"))), world=[3])
def test_16_bit_replicas_are_bitwise_equal_and_learn(ran):
    first, *others = ran.ranks
    assert first["losses"][-1] < first["losses"][0] - 0.3
    for other in others:
        assert equal(first["weights"], other["weights"])


@on_ranks(explored, {"dtype": "bf16", "master_weights": True}, stage=[3])
def test_masters_stay_near_the_reference(ran):
    """Of bf16 gradients: a sign that differed, or a column of another matrix, would be off by the direction itself."""
    for result in ran.ranks:
        assert distances(result, dense(**EXPLORING))["weights"] < 0.02
        assert distances(result, dense())["weights"] > 0.03


@on_ranks(drawn, world=[2, 3], stage=[2])
def test_the_columns_are_the_same_on_every_rank(ran):
    shapes = [(35, 35), (53, 35), (35, 53), (35, 35)]  # of Toy.MATRICES
    assert len(shapes) == len(Toy.MATRICES)
    expected = [one.float() for pair in random_columns(shapes, K, steps=2) for one in pair]
    for result in ran.ranks:
        for column, wanted in zip(result["columns"], expected, strict=True):
            assert torch.equal(column, wanted)


@on_ranks(offloaded, {"stage": 1, "dtype": "fp32"}, {"stage": 3, "dtype": "bf16"})
def test_offloading_changes_no_bit(ran):
    for result in ran.ranks:
        here, *elsewhere = result["ends"]
        for there in elsewhere:
            for what in ("weights", "momenta"):
                assert equal(here[what], there[what])
            assert torch.equal(here["seen"], there["seen"]) and here["losses"] == there["losses"]


@on_ranks(sent, stage=[2])
def test_the_collectives_are_those_of_a_step_without(ran):
    for result in ran.ranks:
        ours = [(name, size) for package, name, size in result["calls"] if package == "ds_mofa"]
        names = ("reduce_scatter_tensor", "all_gather_into_tensor")
        assert Counter(ours) == {**dict.fromkeys(((name, result["buffer"]) for name in names), 1), ("all_reduce", 1): 1}


@on_ranks(saved_and_resumed, {"options": EXPLORING}, stage=[0, 3], dtype=["bf16"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(ran):
    for result in ran.ranks:
        assert result["resumed"]["losses"] == result["uninterrupted"]["losses"]
        assert equal(result["resumed"]["weights"], result["uninterrupted"]["weights"])


WITH = {"options": EXPLORING}


@on_ranks(resumed, WITH, world=[3], after=cases(saved, WITH, stage=[3]), stage=[1])
def test_another_world_and_stage_go_on(ran):
    assert_continued(ran)


@on_ranks(resumed, WITH, world=[3], after=cases(saved, stage=[3]), stage=[2])
def test_a_run_without_exploring_goes_on_with_it(ran):
    assert_loaded(ran)


@on_ranks(resumed, world=[3], after=cases(saved, WITH, stage=[3]), stage=[2])
def test_a_run_with_exploring_goes_on_without_it(ran):
    assert_loaded(ran)


def assert_loaded(ran) -> None:
    """The state is the momentum's, bit for bit whatever k was; then it trains."""
    was = ran.before.ranks[0]["state"]
    for result in ran.ranks:
        assert equal(result["state"]["weights"], was["weights"])
        assert all(x < 1.2 * y for x, y in zip(result["end"]["losses"], ran.before.ranks[0]["end"]["losses"]))
    assert equal(ran.ranks[0]["state"]["factors"], was["factors"])
