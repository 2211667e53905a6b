"""Eight ranks, as of a host of eight GPUs: engines agree with one process, replicas too, checkpoints go to four and two."""

from unittest import mock

import pytest
from comparing import STEPS, assert_same, dense, equal
from engines import clipping, layers, mofasgd, shard
from engines import train as train_plainly
from launching import cases, on_ranks
from scenes import elastic
from torch.distributed.device_mesh import init_device_mesh
from toys import Layers, batches
from training import TIGHT, config, train

pytestmark = pytest.mark.slow


def many(steps: int) -> list:
    """Global batches that divide by eight ranks times three micro-batches."""
    return batches(steps, sequences=24)


def under_zero(stage: int, micro: int) -> dict:
    return train(config(stage, micro=micro), STEPS, data=many(STEPS + 1))


def under_fsdp2(replicas: int) -> dict:
    mesh = init_device_mesh("cpu", (replicas, 8 // replicas), mesh_dim_names=("replicas", "shards"))
    model = shard(layers(), mesh=mesh if replicas > 1 else None)
    return train_plainly(model, mofasgd(model), micro=3, data=many, clip=clipping(model))


def explored(stage: int) -> dict:
    return train(config(stage, dtype="bf16", options={"explore": 4}), 50, data=many(51))


def saved(stage: int) -> dict:
    with mock.patch.object(elastic, "DATA", many(6)):
        return elastic.saved(stage)


def resumed(stage: int, before: str) -> dict:
    with mock.patch.object(elastic, "DATA", many(6)):
        return elastic.resumed(stage, before)


@on_ranks(under_zero, world=[8], stage=[1, 2, 3], micro=[1, 3])
def test_every_stage_agrees_with_the_dense_reference(ran):
    assert_same(ran, dense(data=many))
    with pytest.raises(AssertionError):
        assert_same(ran, dense(data=many, beta=0.8))


@on_ranks(under_fsdp2, world=[8], replicas=[1, 2])
def test_fsdp2_and_hsdp_of_two_by_four_agree_with_the_dense_reference(ran):
    assert_same(ran, dense(Layers, data=many, clip=TIGHT))
    assert all(equal(result["weights"], ran.ranks[0]["weights"]) for result in ran.ranks)


@on_ranks(explored, world=[8], stage=[0, 2])
def test_replicas_are_bitwise_equal_after_fifty_explored_steps_in_bf16(ran):
    assert ran.ranks[0]["losses"][-1] < ran.ranks[0]["losses"][0] - 0.1
    assert all(equal(result["weights"], ran.ranks[0]["weights"]) for result in ran.ranks)


@on_ranks(resumed, world=[4, 2], after=cases(saved, world=[8], stage=[2, 3]), stage=[2, 3], pairwise=True)
def test_a_checkpoint_of_eight_ranks_goes_on_with_four_and_two(ran):
    elastic.assert_continued(ran)
