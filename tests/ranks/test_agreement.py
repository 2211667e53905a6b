"""Every ZeRO stage, world size, micro-batching and capture trains like one process with dense float64 matrices."""

import itertools
import json

import deepspeed
import pytest
import torch
from comparing import STEPS, TOLERANCE, assert_same, dense, distances
from launching import cases, on_ranks, thinned
from toys import Sliver, Toy
from training import config, toy, train


def fp32(stage: int, micro: int, capture: str) -> dict:
    return train(config(stage, micro=micro, options={"capture": capture}), STEPS)


def reduced_often(micro: int) -> dict:
    return train(config(2, micro=micro, options={"adamw_reduce": "micro_batch"}), STEPS)


def balanced(stage: int) -> dict:
    return train(config(stage, options={"balance": 0.5}), STEPS)


def built_in_shards() -> dict:
    settings = config(3)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = Toy()
    assert model.up.weight.shape == (0,), "zero.Init has not partitioned it"
    return train(settings, STEPS, model=model)


def slivers(stage: int) -> dict:
    return train(config(stage, options={"rank": 2}), STEPS, model=toy(Sliver), look=shards)


def mastered(stage: int) -> dict:
    return train(config(stage, dtype="bf16", options={"master_weights": True}), STEPS)


def shards(engine) -> dict[str, int]:
    """Elements of each stage-3 parameter that lie on this rank, without the padding."""
    ends = {}
    for name, param in engine.module.named_parameters():
        if hasattr(param, "ds_tensor"):
            left = param.ds_numel - deepspeed.comm.get_rank() * param.ds_tensor.ds_numel
            ends[name] = max(0, min(left, param.ds_tensor.ds_numel))
    return ends


def bf16(stage: int) -> dict:
    return train(config(stage, dtype="bf16"), 20)


AXES = {"world": [1, 2, 3], "stage": [0, 1, 2, 3], "micro": [1, 3], "capture": ["linear", "hook"]}


@on_ranks(fp32, pairwise=True, **AXES)
def test_agrees_with_the_dense_reference(ran):
    assert_same(ran, dense())


def test_the_quick_ones_hold_every_two_values_of_every_two_axes():
    """The others are marked slow."""
    quick = [{"world": case.world, **json.loads(case.arguments)} for case in thinned(cases(fp32, **AXES))]
    for axes in itertools.combinations(AXES, 2):
        met = {tuple(values[axis] for axis in axes) for values in quick}
        assert met == set(itertools.product(*(AXES[axis] for axis in axes)))
    assert len(quick) <= 14  # of 48; twelve at least


@on_ranks(reduced_often, world=[2, 3], micro=[3])
def test_agrees_where_adamws_gradients_are_sent_with_every_micro_batch(ran):
    assert_same(ran, dense())


@on_ranks(balanced, world=[2, 3], stage=[0, 2, 3])
def test_balanced_matrices_agree_with_the_reference(ran):
    assert_same(ran, dense(balance=0.5))
    with pytest.raises(AssertionError):
        assert_same(ran, dense())


@on_ranks(built_in_shards, world=[1, 2, 3])
def test_a_model_built_under_zero_init_agrees(ran):
    assert_same(ran, dense())


@on_ranks(slivers, world=[3], stage=[0, 1, 2, 3])
def test_agrees_where_a_rank_holds_nothing_of_a_matrix(ran):
    assert_same(ran, dense(Sliver, rank=2))
    if ran.stage == 3:
        held = [result["seen"]["sliver.weight"] for result in ran.ranks]
        assert held == [2, 2, 0]
        rows = [result["seen"]["up.weight"] / 35 for result in ran.ranks]
        assert any(row % 1 for row in rows), "no shard ends inside a row"


@on_ranks(bf16, world=[2, 3], stage=[0, 1, 2, 3])
def test_bf16_replicas_are_bitwise_equal_after_20_steps(ran):
    first, *others = ran.ranks
    assert first["losses"][-1] < first["losses"][0] - 0.5
    for other in others:
        for name, weight in first["weights"].items():
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, other["weights"][name]), name


@on_ranks(mastered, stage=[0, 1, 2, 3])
def test_bf16_with_masters_stays_near_the_reference(ran):
    """bf16 has 8 bits: far from 1e-5, but a master of another shard's rows would be off by the weight itself."""
    for result in ran.ranks:
        assert distances(result, dense())["weights"] < 0.01
        assert distances(result, dense(frozen=True) | {"momenta": {}})["weights"] > 0.03


@pytest.mark.parametrize("wrong", [{"beta": 0.9}, {"frozen": True}, {"rank": 3}], ids=str)
def test_a_wrong_run_would_be_far_outside_the_tolerance(wrong):
    """The control: what the tests above compare does tell a slightly different optimizer apart."""
    far = distances(dense(**wrong), dense() if "frozen" not in wrong else {**dense(), "momenta": {}})
    assert far["losses"] > 10 * TOLERANCE and far["weights"] > 10 * TOLERANCE, far


def test_the_reference_moves_all_that_is_trained_and_nothing_else():
    start, end = toy().state_dict(), dense()["weights"]
    moved = {name for name in end if (end[name] - start[name]).norm() > 1e-3 * (1 + start[name].norm())}
    assert moved == set(end) - {"frozen.weight"}
    assert set(Toy.MATRICES) <= moved
