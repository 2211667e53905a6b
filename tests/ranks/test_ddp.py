"""Whole models on several ranks: DistributedDataParallel, and ranks that reduce AdamW's gradients themselves."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from comparing import assert_same, dense, distances, equal
from engines import clipping, galore, layers, mofasgd, train
from launching import on_ranks
from scenes.collectives import Recorded
from torch.nn.parallel import DistributedDataParallel
from toys import Layers, Marked, Toy, batches, marked, plenty
from training import GALORE, TIGHT, toy

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


def used_by_one_rank(capture: str, clip: bool) -> dict:
    model = toy(Marked)
    optimizer = mofasgd(model, capture=capture)
    return train(DistributedDataParallel(model), optimizer, data=marked, clip=clipping(model) if clip else None)


def balanced_and_explored() -> dict:
    model = layers()
    optimizer = mofasgd(model, balance=0.5, explore=2)
    return train(DistributedDataParallel(model), optimizer)


def by_galore() -> dict:
    model = layers()
    optimizer = galore(model)
    return train(DistributedDataParallel(model), optimizer)


def compiled_whole() -> dict:
    """DDP wraps what torch.compile has wrapped, and so has other names for all parameters."""
    model = layers()
    optimizer = mofasgd(model)
    wrapped = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
    with Recorded() as recorded:
        result = train(wrapped, optimizer, 1)
    rest = sum(param.numel() for group in optimizer.adamw_groups for param in group["params"])
    return {**result, "largest": max(recorded.sums()), "rest": rest, "buffer": optimizer.matrices.layout.numel}


def in_pairs() -> dict:
    """Each two ranks of the four train a model of their own, on the same batches."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[dist.get_rank() // 2]
    model = layers()
    optimizer = mofasgd(model, process_group=group)
    wrapped = DistributedDataParallel(model, process_group=group)
    return train(wrapped, optimizer, clip=clipping(model))


def evaluated_by_one_rank() -> dict:
    """Before all train."""
    model = layers()
    optimizer = mofasgd(model)
    if dist.get_rank() == 0:
        with torch.no_grad():
            model(*plenty(1)[0])
    return train(DistributedDataParallel(model), optimizer)


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


@on_ranks(used_by_one_rank, pairwise=True, world=[2, 3], capture=["linear", "hook"], clip=[False, True])
def test_a_matrix_that_one_rank_alone_uses_agrees(ran):
    wanted = dense(Marked, data=marked, clip=TIGHT if ran.clip else 0.0)
    assert_same(ran, wanted)
    for result in ran.ranks:
        assert equal(result["weights"], ran.ranks[0]["weights"])
        assert equal(result["norms"], ran.ranks[0]["norms"])
        assert not ran.clip or result["norms"] == pytest.approx(wanted["norms"], rel=1e-5)


@on_ranks(balanced_and_explored)
def test_balanced_and_explored_matrices_agree(ran):
    assert_same(ran, dense(Layers, data=plenty, balance=0.5, explore=2))


@on_ranks(by_galore)
def test_galore_agrees(ran):
    assert_same(ran, dense(Layers, data=plenty, optimizer="GaLore", adamw_lr=GALORE["adamw_lr"]))


@on_ranks(compiled_whole)
def test_a_compiled_model_s_matrices_are_left_alone(ran):
    assert_same(ran, dense(Layers, data=plenty, steps=1))
    for result in ran.ranks:
        assert result["largest"] == max(result["rest"], result["buffer"])


@on_ranks(in_pairs, world=[4])
def test_a_process_group_of_some_ranks_keeps_to_itself(ran):
    """All four see their own quarter: the pairs' models differ."""
    for one, other in (ran.ranks[:2], ran.ranks[2:]):
        assert equal(one["weights"], other["weights"]) and equal(one["norms"], other["norms"])
    assert not equal(ran.ranks[0]["weights"], ran.ranks[2]["weights"])


@on_ranks(evaluated_by_one_rank)
def test_one_rank_may_evaluate_before_all_train(ran):
    assert_same(ran, dense(Layers, data=plenty))


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
