"""Whole models on several ranks: DistributedDataParallel, and ranks that reduce AdamW's gradients themselves."""

from unittest import mock

import torch.distributed as dist
from comparing import assert_same, dense, distances, equal
from engines import clipping, layers, mofasgd, train
from launching import on_ranks
from torch.nn.parallel import DistributedDataParallel
from toys import Layers, Toy, batches, plenty
from training import TIGHT, toy

from ds_mofa.backends.ddp import ReplicaExchange


def fp32(capture: str, micro: int) -> dict:
    """Each rank begins with weights of its own, of which those of the first count."""
    model = toy(Layers, seed=dist.get_rank())
    optimizer = mofasgd(model, capture=capture)
    wrapped = DistributedDataParallel(model)
    return train(wrapped, optimizer, micro=micro, clip=clipping(model))


def with_a_matrix_of_the_root(switch: str) -> dict:
    """Toy has one in the module that is wrapped, for which DDP has another name."""
    model = toy(Toy)
    optimizer = mofasgd(model)
    wrapped = DistributedDataParallel(model, **{switch: True})
    return train(wrapped, optimizer, data=batches)


def without_sync() -> dict:
    model = layers()
    optimizer = mofasgd(model)
    wrapped = DistributedDataParallel(model)

    def sync(last: bool) -> None:
        wrapped.require_backward_grad_sync = last  # what no_sync() sets

    return train(wrapped, optimizer, micro=3, sync=sync)


def bf16() -> dict:
    model = layers().bfloat16()
    optimizer = mofasgd(model)
    return train(DistributedDataParallel(model), optimizer, 8)


def by_hand(capture: str) -> dict:
    """No wrapper: the script adds up what AdamW trains."""
    model = layers()
    optimizer = mofasgd(model, capture=capture)

    def reduce() -> float:
        for group in optimizer.adamw_groups:
            for param in group["params"]:
                dist.all_reduce(param.grad)
                param.grad /= dist.get_world_size()
        return clipping(model)()

    return train(model, optimizer, micro=3, clip=reduce)


def with_own_sketches_alone() -> dict:
    model = layers()
    optimizer = mofasgd(model)
    with mock.patch.object(
        ReplicaExchange, "reduce_scatter", lambda self, flat, segment: flat.clone() * self.processes
    ):
        return train(DistributedDataParallel(model), optimizer)


@on_ranks(fp32, pairwise=True, world=[2, 3, 4], capture=["linear", "hook"], micro=[1, 3])
def test_ddp_agrees_with_the_dense_reference(ran):
    assert_clipped(ran)


@on_ranks(by_hand, world=[2, 3], capture=["linear", "hook"])
def test_plain_ranks_agree(ran):
    assert_clipped(ran)


def assert_clipped(ran) -> None:
    wanted = dense(Layers, data=plenty, clip=TIGHT)
    assert_same(ran, wanted)
    for result in ran.ranks:
        far = max(abs(one - other) / other for one, other in zip(result["norms"], wanted["norms"], strict=True))
        assert far < 1e-5
        assert equal(result["weights"], ran.ranks[0]["weights"])


@on_ranks(
    with_a_matrix_of_the_root, world=[2], switch=["find_unused_parameters", "gradient_as_bucket_view", "static_graph"]
)
def test_ddp_s_switches_agree_and_so_does_a_matrix_of_the_root(ran):
    assert_same(ran, dense())


@on_ranks(without_sync)
def test_micro_batches_without_sync_agree(ran):
    assert_same(ran, dense(Layers, data=plenty))


@on_ranks(bf16, world=[3])
def test_bf16_replicas_are_bitwise_equal(ran):
    first, *others = ran.ranks
    assert first["losses"][-1] < first["losses"][0] - 0.1
    for other in others:
        assert equal(first["weights"], other["weights"])
        assert equal(first["working"], other["working"])


@on_ranks(with_own_sketches_alone)
def test_own_sketches_alone_would_be_far_outside_the_tolerance(ran):
    """The control."""
    for result in ran.ranks:
        far = distances(result, dense(Layers, data=plenty))
        assert far["weights"] > 1e-3 and far["momenta"] > 1e-2, far
    one, other = (result["weights"]["feed.up.weight"] for result in ran.ranks)
    assert not equal(one, other)
