"""GraphedMicroBatch on several ranks, where a CPU captures nothing and all else is the same: who gets whose mean, and when."""

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparing import assert_same, dense, equal
from engines import alone, built, clipping, layers, mofasgd, train, whole
from launching import on_ranks
from scenes.collectives import Recorded
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import Layers, Marked, marked, micro_batches, plenty
from training import TIGHT, config, engine_for, toy

from ds_mofa import GraphedMicroBatch
from ds_mofa.backends.deepspeed.registration import optimizer_of


class Looped(nn.Module):
    """A model whose forward is forward and backward of a micro-batch.

    Args:
        model: of layers.
        micro: micro-batches of a step.
        silent: whether the last one of them alone sends anything.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, micro: int, silent: bool = True, **more: Any
    ):
        super().__init__()
        self.module, self.silent, self.last = model, silent, True
        self.micro_batch, self.micro = GraphedMicroBatch(self.share, optimizer, **more), micro

    def share(self, *part):
        return self.module(*part) / self.micro

    def forward(self, *part):
        if not torch.is_grad_enabled():
            return self.module(*part)
        with self.micro_batch.no_sync() if self.silent and not self.last else contextlib.nullcontext():
            return self.micro_batch(*part) * self.micro

    def sync(self, last: bool) -> None:
        self.last = last

    def train_on(self, data, clip=None) -> dict:
        """As ``train`` does."""
        how = {"micro": self.micro, "sync": self.sync, "backward": lambda loss: None, "clip": clip}
        return train(self, self.micro_batch._optimizer, data=data, **how)


def fp32(capture: str, silent: bool) -> dict:
    """Each rank begins with weights of its own, of which those of the first count."""
    model = toy(Layers, seed=dist.get_rank())
    return Looped(model, mofasgd(model, capture=capture), 3, silent).train_on(plenty, clipping(model))


def used_by_one_rank() -> dict:
    model = toy(Marked)
    return Looped(model, mofasgd(model), 1).train_on(marked, clipping(model))


def in_pairs() -> dict:
    """Each two ranks of the four train a model of their own, on the same batches."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = layers()
    optimizer = mofasgd(model, process_group=pairs[dist.get_rank() // 2])
    return Looped(model, optimizer, 1).train_on(plenty, clipping(model))


def by_sgd(graphed: bool) -> dict[str, torch.Tensor]:
    """Weights after four steps of torch's own optimizer, beside DistributedDataParallel's."""
    model = toy(Layers, seed=dist.get_rank())
    for param in model.parameters():
        if not param.requires_grad:  # of which the optimizer knows nothing
            dist.broadcast(param.data, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loop = Looped(model, optimizer, 2) if graphed else DistributedDataParallel(model)
    for batch in plenty(4):
        for i, part in enumerate(micro_batches(batch, dist.get_rank(), dist.get_world_size(), 2)):
            if graphed:
                loop.sync(i == 1)
                loop(*part)
            else:
                (loop(*part) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TIGHT)
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def beside_ddp() -> dict:
    return {"graphed": by_sgd(graphed=True), "ddp": by_sgd(graphed=False)}


def sent() -> dict:
    """What a step of three micro-batches sends, of the second step."""
    model = layers()
    optimizer = mofasgd(model)
    looped = Looped(model, optimizer, 3)
    found = []
    for batch in plenty(2):
        with Recorded() as recorded:
            for i, part in enumerate(micro_batches(batch, dist.get_rank(), dist.get_world_size(), 3)):
                looped.sync(i == 2)
                looped(*part)
            optimizer.step()
        optimizer.zero_grad()
        found.append(sorted(recorded.sums()))
    rest = [param.numel() for group in optimizer.adamw_groups for param in group["params"]]
    return {"sums": found[1], "rest": sum(rest), "flags": len(rest), "sketches": optimizer.matrices.layout.numel}


def never_sent() -> str:
    model = layers()
    optimizer = mofasgd(model)
    looped = Looped(model, optimizer, 1)
    looped.sync(False)
    (part,) = micro_batches(plenty(1)[0], dist.get_rank(), dist.get_world_size(), 1)
    looped(*part)
    with pytest.raises(RuntimeError, match="nobody adds them up") as raised:
        optimizer.step()
    return str(raised.value)


def in_another_group() -> str:
    model = layers()
    optimizer = mofasgd(model)
    with pytest.raises(RuntimeError, match="added up over MoFaSGD's") as raised:
        GraphedMicroBatch(model, optimizer, process_group=alone())
    return str(raised.value)


def refused(by: str) -> str:
    with contextlib.ExitStack() as stack:
        if by == "fsdp2":
            model, optimizer = built()
        else:
            model = stack.enter_context(engine_for(config(1)))
            optimizer = optimizer_of(model)
        with pytest.raises(RuntimeError, match="whole weights in a plain loop") as raised:
            GraphedMicroBatch(model, optimizer)
    return str(raised.value)


@on_ranks(fp32, pairwise=True, world=[2, 3], capture=["linear", "hook"], silent=[False, True])
def test_it_agrees_with_the_dense_reference(ran):
    wanted = dense(Layers, data=plenty, clip=TIGHT)
    assert_same(ran, wanted)
    for result in ran.ranks:
        assert result["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert equal(result["weights"], ran.ranks[0]["weights"])


@on_ranks(used_by_one_rank)
def test_what_one_rank_alone_uses_agrees(ran):
    assert_same(ran, dense(Marked, data=marked, clip=TIGHT))
    for result in ran.ranks:
        assert equal(result["weights"], ran.ranks[0]["weights"])


@on_ranks(in_pairs, world=[4])
def test_a_process_group_keeps_to_itself(ran):
    for one, other in (ran.ranks[:2], ran.ranks[2:]):
        assert equal(one["weights"], other["weights"]) and equal(one["norms"], other["norms"])
    assert not equal(ran.ranks[0]["weights"], ran.ranks[2]["weights"])


@on_ranks(beside_ddp)
def test_torch_s_optimizers_have_the_mean_too(ran):
    for result in ran.ranks:
        assert equal(result["graphed"], ran.ranks[0]["graphed"])
        for name, weight in result["ddp"].items():
            torch.testing.assert_close(result["graphed"][name], weight, rtol=1e-4, atol=1e-5)


@on_ranks(sent)
def test_a_step_sends_sketches_and_the_rest_once(ran):
    for result in ran.ranks:
        assert sum(result["sums"]) == pytest.approx(result["sketches"] + result["rest"] + result["flags"], abs=8), (
            result
        )
        assert result["sums"][-2:] == sorted([result["sketches"], result["rest"]])


@on_ranks(never_sent)
def test_a_step_after_no_sync_alone_is_refused(ran):
    assert all("wrap the model" in message for message in ran.ranks)


def wrapped() -> str:
    model = layers()
    optimizer = mofasgd(model)
    looped = Looped(DistributedDataParallel(model), optimizer, 1)
    (part,) = micro_batches(plenty(1)[0], dist.get_rank(), dist.get_world_size(), 1)
    with pytest.raises(RuntimeError, match="Leave it out: the processes' gradients are averaged here") as raised:
        looped(*part)
    return str(raised.value)


@on_ranks(wrapped)
def test_what_would_send_gradients_too_is_refused(ran):
    assert all("DistributedDataParallel" in message for message in ran.ranks)


@on_ranks(in_another_group)
def test_another_process_group_than_the_optimizer_s_is_refused(ran):
    assert all("leave it out here" in message for message in ran.ranks)


@on_ranks(refused, by=["fsdp2", "deepspeed"])
def test_sharded_weights_and_engines_are_refused(ran):
    assert all("leave it whole on every process" in message for message in ran.ranks)
