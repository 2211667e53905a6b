"""HSDP: two replicas of two shards each. Sketches are added up over all four ranks, and replicas stay equal bit for bit."""

from unittest import mock

import pytest
import torch.distributed as dist
from comparing import assert_same, dense, distances, equal
from engines import built, clipping, layers, mofasgd, shard, square, train
from launching import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from toys import Layers, plenty
from training import TIGHT

from ds_mofa.backends import fsdp2


def fp32(cut: str, capture: str, late_all_reduce: bool) -> dict:
    """``late_all_reduce``: gradients are added up over the replicas after the last micro-batch alone; and then clipping is the
    optimizer's own.
    """
    model, optimizer = built(cut, square(), {"capture": capture})
    sync = model.set_requires_all_reduce if late_all_reduce else None
    clip = (lambda: optimizer.clip_grad_norm_(TIGHT)) if late_all_reduce else clipping(model)
    return train(model, optimizer, micro=3, clip=clip, sync=sync)


def bf16(masters: bool) -> dict:
    model = shard(layers().bfloat16(), mesh=square())
    optimizer = mofasgd(model, master_weights=masters)
    held = [matrix.param.dtype for matrix in optimizer.split.matrices]
    return {**train(model, optimizer, 8), "dtypes": sorted({str(dtype) for dtype in held})}


def over_one_replica_alone() -> dict:
    model = shard(layers(), mesh=square())
    group = square()["shards"].get_group()
    with mock.patch.object(fsdp2, "_group_of", lambda mesh, _: group):
        return train(model, mofasgd(model))


def with_the_group_of_one_replica() -> dict:
    model = shard(layers(), mesh=square())
    with pytest.raises(fsdp2.OptionError) as refused:
        mofasgd(model, process_group=square()["shards"].get_group())
    return {"message": str(refused.value)}


def on_a_part_of_the_ranks(named: bool) -> dict:
    """Each two ranks of the four train a model of their own, HSDP over a mesh of 2 x 1."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = dist.get_rank() // 2
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("models", "replicas", "shards"))
    model = shard(layers(), mesh=mesh["replicas", "shards"])
    if not named:
        with pytest.raises(fsdp2.OptionError) as refused:
            mofasgd(model)
        return {"message": str(refused.value)}
    return train(model, mofasgd(model, process_group=pairs[mine]))


@on_ranks(
    fp32,
    {"cut": "blocks", "capture": "linear", "late_all_reduce": False},
    {"cut": "each", "capture": "linear", "late_all_reduce": True},
    {"cut": "whole", "capture": "hook", "late_all_reduce": True},
    world=[4],
)
def test_agrees_with_the_dense_reference(ran):
    wanted = dense(Layers, data=plenty, clip=TIGHT)
    assert_same(ran, wanted)
    for result in ran.ranks:
        assert result["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert equal(result["weights"], ran.ranks[0]["weights"])


@on_ranks(bf16, world=[4], masters=[False, True])
def test_16_bit_replicas_are_bitwise_equal(ran):
    first, *others = ran.ranks
    assert first["dtypes"] == ["torch.bfloat16"]
    assert first["losses"][-1] < first["losses"][0] - 0.1
    for other in others:
        assert equal(first["weights"], other["weights"])
        assert equal(first["working"], other["working"])


@on_ranks(over_one_replica_alone, world=[4])
def test_sketches_of_one_replica_alone_would_be_far_off_and_let_replicas_drift_apart(ran):
    """The control."""
    assert distances(ran.ranks[0], dense(Layers, data=plenty))["weights"] > 1e-3
    one, other = ran.ranks[0]["weights"], ran.ranks[2]["weights"]
    assert not equal(one["feed.up.weight"], other["feed.up.weight"])


@on_ranks(with_the_group_of_one_replica, world=[4])
def test_a_group_that_does_not_cover_the_mesh_is_refused(ran):
    for rank, result in enumerate(ran.ranks):
        mine = [0, 1] if rank < 2 else [2, 3]
        assert f"process_group has the ranks {mine}, and the mesh of the matrices [0, 1, 2, 3]" in result["message"]


@on_ranks(on_a_part_of_the_ranks, world=[4], named=[False, True])
def test_a_mesh_of_a_part_of_the_ranks_wants_their_group(ran):
    if not ran.named:
        for result in ran.ranks:
            assert "has 2 of 4 processes: pass process_group=, a group of them all" in result["message"]
        return
    for one, other in (ran.ranks[:2], ran.ranks[2:]):
        assert equal(one["weights"], other["weights"])
    assert not equal(ran.ranks[0]["weights"], ran.ranks[2]["weights"])
