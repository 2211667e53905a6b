"""Stacked experts train like one process with dense float64 matrices, one by one; and are saved, resumed and offloaded."""

from unittest import mock

import pytest
import torch
from comparing import assert_same, dense
from engines import mofasgd, shard, train
from launching import cases, on_ranks
from scenes import elastic, resuming, torch_checkpoints
from torch.nn.parallel import DistributedDataParallel
from toys import Routed, ToyExperts, plenty
from training import config, toy
from training import train as train_by_deepspeed

from ds_mofa.capture.sketch import Sketch


def without_gradients():
    """Within: no gradient of a stack may be formed."""
    sketched = Sketch.add_gradient

    def add_gradient(self, grad):
        assert grad.dim() == 2, "the gradient of a stack was formed"
        sketched(self, grad)

    return mock.patch.object(Sketch, "add_gradient", add_gradient)


def by_zero(stage: int, micro: int = 3, **options) -> dict:
    settings = config(stage, micro=micro, options=options)
    with without_gradients():
        return train_by_deepspeed(settings, 5, data=plenty(6), model=toy(Routed))


def offloaded(stage: int) -> dict:
    cpu = {"device": "cpu", "pin_memory": False}
    where = {"offload_optimizer": cpu, **({"offload_param": cpu} if stage == 3 else {})}
    settings = config(
        stage, micro=1, options={"torch_adam": True}, zero_optimization=where, zero_force_ds_cpu_optimizer=False
    )
    with without_gradients():
        return train_by_deepspeed(settings, 5, data=plenty(6), model=toy(Routed))


def by_hook(stage: int) -> dict:
    return train_by_deepspeed(config(stage, options={"capture": "hook"}), 5, data=plenty(6), model=toy(Routed))


def by_torch(engine: str, **options) -> dict:
    model = toy(Routed)
    wrapped = shard(model) if engine == "fsdp2" else model
    optimizer = mofasgd(model, **options)
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    with without_gradients():
        return train(wrapped, optimizer, micro=3)


def check(ran, **settings) -> None:
    assert_same(ran, dense(Routed, data=plenty, **settings))
    started = toy(Routed).moe.experts
    for result in ran.ranks:
        for name in ("gate_up_proj", "down_proj"):
            idle = result["weights"][f"moe.experts.{name}"][ToyExperts.EXPERTS - 1]
            assert torch.equal(idle.cpu(), getattr(started, name)[-1].detach()), "an expert without tokens has moved"


@on_ranks(by_zero, world=[2], stage=[0, 2, 3])
def test_under_zero(ran):
    check(ran)


@on_ranks(by_zero, world=[3], stage=[3], micro=[1])
def test_shards_that_end_within_an_expert(ran):
    check(ran)


@on_ranks(by_torch, engine=["fsdp2", "ddp"])
def test_without_deepspeed(ran):
    check(ran)


@on_ranks(by_torch, engine=["fsdp2"], world=[3])
def test_more_processes_than_divide_the_experts(ran):
    check(ran)


@on_ranks(by_zero, stage=[3], explore=[2])
def test_explored(ran):
    check(ran, explore=2)


@on_ranks(offloaded, stage=[2, 3])
def test_offloaded(ran):
    check(ran)


@on_ranks(by_hook, stage=[2, 3])
def test_by_the_hook(ran):
    check(ran)


def with_a_shifted_expert() -> dict:
    grouped = Sketch.add_grouped

    def shifted(self, left, right, ends, left_rows=None, right_rows=None):
        grouped(self, left.roll(1, 0), right, ends, left_rows, right_rows)

    with mock.patch.object(Sketch, "add_grouped", shifted):
        return by_zero(2)


@on_ranks(with_a_shifted_expert)
def test_experts_that_are_mixed_up_would_be_seen(ran):
    """The control."""
    with pytest.raises(AssertionError):
        check(ran)


ROUTED = {"kind": "Routed"}
MASTERS = {"dtype": "bf16", "options": {"master_weights": True}}


@on_ranks(resuming.saved_and_resumed, ROUTED, stage=[2, 3], dtype=["bf16"], options=[{}, {"master_weights": True}])
def test_resumed_bit_for_bit(ran):
    resuming.assert_resumed(ran)
    stack = ran.ranks[0]["resumed"]["state"]["matrices"]["moe.experts.down_proj"]
    assert stack["U"].shape == (7, 35, 4) and stack["sigma"].shape == (7, 4), "a stack is one tensor of each"


@on_ranks(elastic.resumed, ROUTED, world=[3], after=cases(elastic.saved, ROUTED, stage=[3]), stage=[2])
def test_on_more_ranks_in_another_stage(ran):
    elastic.assert_continued(ran)


@on_ranks(
    elastic.resumed,
    {**ROUTED, **MASTERS},
    world=[1],
    after=cases(elastic.saved, {**ROUTED, **MASTERS}, stage=[3]),
    stage=[3],
)
def test_masters_on_other_ranks(ran):
    elastic.assert_continued(ran, tolerance=2e-2)
    held = {}
    for result in ran.before.ranks:
        for name, part in result["masters"].items():
            held[name] = torch.cat([held.get(name, part[:0]), part])
    for name, master in ran.ranks[0]["masters"].items():
        assert torch.equal(master, held[name][: master.numel()]), name


EXPERTS = {"experts": True}


@on_ranks(torch_checkpoints.resumed, EXPERTS, after=cases(torch_checkpoints.saved, EXPERTS), way=["dcp"], world=[2, 3])
def test_torch_s_checkpoints(ran):
    torch_checkpoints.assert_continued(ran)
