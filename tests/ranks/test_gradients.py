"""Gradients of AdamW's part in stages 1 and 2: what has a group of its own is reduce-scattered, with the same result."""

import contextlib
from unittest import mock

import deepspeed
import torch
from comparing import STEPS, assert_same, dense
from deepspeed.utils import safe_get_full_grad
from launching import on_ranks
from test_communication import watched
from toys import Padded, batches, micro_batches
from training import config, engine_for, toy, train, train_step

from ds_mofa.deepspeed import build
from ds_mofa.deepspeed.gradients import GradientMixin

LARGE = 48 * 35  # embedding and head


@contextlib.contextmanager
def large_apart(scatter: bool = True):
    """Embedding and head count as large, as a real model's do; ``scatter``: whether they take the way tested here."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(build, "LARGE", LARGE))
        if not scatter:
            patches.enter_context(mock.patch.object(GradientMixin, "_covered_by_partitions", lambda *_: False))
        yield


def trained(stage: int, micro: int, scatter: bool = True, **settings) -> dict:
    with large_apart(scatter):
        settings = config(stage, micro=micro, **settings)
        return train(settings, STEPS, model=toy(Padded), look=lambda engine: len(engine.optimizer.scattered))


def both_ways(stage: int, overlap: bool) -> dict:
    settings = {"dtype": "bf16", "zero_optimization": {"overlap_comm": overlap}}
    return {scatter: trained(stage, 3, scatter == "ours", **settings) for scatter in ("ours", "deepspeed's")}


def sent(stage: int) -> dict:
    rooms, copy = [], GradientMixin.copy_grads_in_partition

    def copied(self, *args):
        copy(self, *args)
        rooms.append(self.grads_in_partition.numel())

    with large_apart(), engine_for(config(stage, micro=3), toy(Padded)) as engine:
        first, second = batches(2)
        train_step(engine, first)
        with watched() as calls, mock.patch.object(GradientMixin, "copy_grads_in_partition", copied):
            train_step(engine, second)
        return {"calls": calls, "rooms": rooms}


def asked(coalesced: bool) -> dict:
    return {scatter: head_after(coalesced, scatter == "ours") for scatter in ("ours", "deepspeed's")}


def head_after(coalesced: bool, scatter: bool) -> dict:
    """The head's gradient between backward and step, and the head after it."""
    with large_apart(scatter), engine_for(config(2, micro=3), toy(Padded)) as engine:
        rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        parts = micro_batches(batches(1)[0], rank, world, 3)
        with engine.coalesce_grad_reduction() if coalesced else contextlib.nullcontext():
            for number, part in enumerate(parts):
                engine.backward(engine(*part))
                if not coalesced and number < 2:
                    engine.step()
        gradient = safe_get_full_grad(engine.module.head.weight).clone()
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        return {"gradient": gradient, "head": engine.module.head.weight.detach().clone()}


def dropped(stage: int) -> dict:
    return {scatter: after_a_dropped_backward(stage, scatter == "ours") for scatter in ("ours", "deepspeed's")}


def after_a_dropped_backward(stage: int, scatter: bool) -> dict:
    """The head after a backward that no step follows, and then a whole step on another batch."""
    with large_apart(scatter), engine_for(config(stage), toy(Padded)) as engine:
        first, second = batches(2)
        (part,) = micro_batches(first, deepspeed.comm.get_rank(), deepspeed.comm.get_world_size(), 1)
        engine.backward(engine(*part))
        engine.optimizer.zero_grad()
        train_step(engine, second)
        return {"head": engine.module.head.weight.detach().clone()}


@on_ranks(trained, world=[2, 3], stage=[1, 2], micro=[1, 3])
def test_reduce_scattered_gradients_agree_with_the_reference(ran):
    assert_same(ran, dense(Padded))
    assert all(result["seen"] == 2 for result in ran.ranks)


@on_ranks(both_ways, stage=[1, 2], overlap=[False, True])
def test_they_are_bitwise_what_deepspeed_makes_of_them(ran):
    for result in ran.ranks:
        ours, deepspeeds = result["ours"], result["deepspeed's"]
        assert (ours["seen"], deepspeeds["seen"]) == (2, 0)
        for name, weight in ours["weights"].items():
            assert torch.equal(weight, deepspeeds["weights"][name]), name


@on_ranks(sent, stage=[1, 2])
def test_they_are_sent_once_a_step_and_half_as_far(ran):
    for result in ran.ranks:
        calls = [(name, size) for package, name, size in result["calls"] if package == "deepspeed"]
        assert calls.count(("reduce_scatter_tensor", LARGE)) == 2
        assert max(size for name, size in calls if name in ("all_reduce", "reduce")) < LARGE // 2
    rooms = [room for result in ran.ranks for room in result["rooms"]]
    assert rooms and max(rooms) < LARGE // 2  # DeepSpeed's buffer for what is not scattered


@on_ranks(asked, coalesced=[False, True])
def test_others_find_them_where_deepspeed_puts_them(ran):
    for result in ran.ranks:
        ours, deepspeeds = result["ours"], result["deepspeed's"]
        assert ours["gradient"].any()
        for name in ("gradient", "head"):
            assert torch.equal(ours[name], deepspeeds[name]), name


@on_ranks(dropped, stage=[1, 2])
def test_a_backward_without_a_step_leaves_nothing(ran):
    for result in ran.ranks:
        assert torch.equal(result["ours"]["head"], result["deepspeed's"]["head"])
