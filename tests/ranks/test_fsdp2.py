"""Models that fully_shard has cut train like one process with dense float64 matrices."""

import gc
from unittest import mock

import pytest
from comparing import assert_same, dense, distances, equal
from engines import built, galore, layers, mofasgd, shard, step_on, train, whole
from launching import on_ranks
from toys import Layers, plenty
from training import GALORE

from ds_mofa.backends.fsdp2 import ShardExchange


def fp32(cut: str, micro: int, capture: str) -> dict:
    model, optimizer = built(cut, options={"capture": capture})
    rows = {name: len(param.to_local()) for name, param in model.named_parameters()}
    return {**train(model, optimizer, micro=micro), "rows": rows}


def balanced_and_explored(cut: str) -> dict:
    return train(*built(cut, options={"balance": 0.5, "explore": 2}), micro=3)


def by_galore() -> dict:
    model = shard(layers())
    return train(model, galore(model), micro=3)


def taken_over(by: str) -> dict:
    """Then the gradients of a step are autograd's: every rank has the whole batch."""
    model, optimizer = built()
    first, second, third = plenty(3)
    step_on(model, optimizer, first)
    other = mofasgd(model)
    step_on(model, other, second)
    with pytest.raises(RuntimeError, match="trains nothing any more"):
        optimizer.step()
    if by == "detach":
        other.detach()
    del optimizer, other
    gc.collect()
    model.zero_grad()
    model(*third).backward()
    plain = layers()
    plain.load_state_dict(whole(model), strict=False)  # which has one name of the two of a tied weight
    plain(*third).backward()
    pairs = [(param.grad, plain.get_parameter(name).grad) for name, param in model.named_parameters()]
    return {"far": [float((a.full_tensor() - b).norm() / b.norm()) for a, b in pairs if b is not None]}


def with_a_sum_for_a_mean() -> dict:
    with mock.patch.object(ShardExchange, "mean_scale", 1.0):
        return train(*built())


AXES = {"world": [1, 2, 3, 4], "cut": ["blocks", "whole", "each"], "micro": [1, 3], "capture": ["linear", "hook"]}


@on_ranks(fp32, pairwise=True, **AXES)
def test_agrees_with_the_dense_reference(ran):
    assert_same(ran, dense(Layers, data=plenty))
    for result in ran.ranks:
        assert equal(result["working"], ran.ranks[0]["working"])
    if ran.case.world == 3:
        assert [result["rows"]["gate.weight"] for result in ran.ranks] == [2, 2, 0]


@on_ranks(balanced_and_explored, world=[3], cut=["blocks"])
def test_balanced_and_explored_matrices_agree(ran):
    assert_same(ran, dense(Layers, data=plenty, balance=0.5, explore=2))
    with pytest.raises(AssertionError):
        assert_same(ran, dense(Layers, data=plenty))


@on_ranks(by_galore, world=[3])
def test_galore_agrees(ran):
    assert_same(ran, dense(Layers, data=plenty, optimizer="GaLore", adamw_lr=GALORE["adamw_lr"]))


@on_ranks(taken_over, by=["detach", "deletion"])
def test_the_next_optimizer_finds_a_model_as_any_other(ran):
    for result in ran.ranks:
        assert len(result["far"]) == 13 and max(result["far"]) < 1e-5


@on_ranks(with_a_sum_for_a_mean)
def test_a_wrong_scale_would_be_far_outside_the_tolerance(ran):
    """The control: the directions of the linears' updates do not know their scale, but their momenta do."""
    far = distances(ran.ranks[0], dense(Layers, data=plenty))
    assert far["momenta"] > 0.1, far
