"""Clipping, scaling and zeroing by torch's own functions, on ranks: what a plain loop does to ``.grad`` it does here."""

import pytest
import torch
import torch.distributed as dist
from comparing import assert_same, dense, equal
from engines import alone, built, clipping, layers, mofasgd, number, step_on, train, whole
from launching import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import Layers, Tied, plenty
from training import TIGHT, toy

ENGINES = ["ddp", "fsdp2"]


def made(engine: str) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """The model, what is called in its place, and the optimizer."""
    if engine == "fsdp2":
        model, optimizer = built()
        return model, model, optimizer
    model = layers()
    optimizer = mofasgd(model)
    return model, DistributedDataParallel(model), optimizer


def clipped(engine: str, foreach: bool | None, micro: int) -> dict:
    model, called, optimizer = made(engine)
    return train(called, optimizer, micro=micro, clip=clipping(model, foreach))


def by_the_optimizer(engine: str) -> dict:
    model, called, optimizer = made(engine)
    return train(called, optimizer, micro=3, clip=lambda: optimizer.clip_grad_norm_(TIGHT))


def clipped_apart(engine: str, foreach: bool | None) -> dict:
    model, called, optimizer = made(engine)
    some = list(model.feed.parameters())
    ids = set(map(id, some))
    rest = [param for param in model.parameters() if id(param) not in ids]

    def clip():
        return tuple(torch.nn.utils.clip_grad_norm_(part, TIGHT, foreach=foreach) for part in (some, rest))

    return train(called, optimizer, clip=clip)


def zeroed(engine: str, to_none: bool) -> dict:
    """By the model's ``zero_grad``, as HF's Trainer does it; and between, a gradient that is thrown away."""
    model, called, optimizer = made(engine)
    tokens, targets = plenty(1)[0]

    def zero() -> None:
        called(tokens, targets).backward()
        called.zero_grad(set_to_none=to_none)

    return train(called, optimizer, zero=zero, clip=clipping(model))


def scaled(engine: str) -> dict:
    """By a GradScaler, with an overflow in the third step."""
    model, called, optimizer = made(engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    norms = []

    def clip() -> torch.Tensor:
        scaler.unscale_(optimizer)
        norms.append(clipping(model)())
        return norms[-1]

    def move() -> None:
        scaler.step(optimizer)
        scaler.update()

    result = train(
        called, optimizer, micro=3, clip=clip, move=move, backward=lambda loss: scaler.scale(loss).backward()
    )
    return {**result, "scale": scaler.get_scale()}


def overflowing(engine: str, rank: int) -> dict:
    """One rank's loss overflows: nobody steps."""
    model, called, optimizer = made(engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = whole(model)
    factor = float("inf") if dist.get_rank() == rank else 1.0

    def move() -> None:
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    step_on(called, optimizer, plenty(1)[0], move=move, backward=lambda loss: scaler.scale(loss * factor).backward())
    return {"before": before, "after": whole(model), "scale": scaler.get_scale(), "steps": optimizer.matrices.steps}


def without_a_number(engine: str, clip: bool) -> dict:
    """The loss of the second step is NaN on one rank."""
    model, called, optimizer = made(engine)
    first, second, third = plenty(3)
    step_on(called, optimizer, first)
    before = whole(model)
    factor = float("nan") if dist.get_rank() == 1 else 1.0
    how = {"clip": clipping(model) if clip else None}
    step_on(called, optimizer, second, backward=lambda loss: (loss * factor).backward(), **how)
    after = whole(model)
    step_on(called, optimizer, third, **how)
    counted = {"skipped": optimizer.matrices.skipped, "steps": optimizer.matrices.steps}
    return {"before": before, "after": after, "end": whole(model), **counted}


def clipped_between(engine: str) -> dict:
    """After the first of two micro-batches: the second counts as it is. And on each rank alone, on the whole batch."""
    results = []
    for name in (engine, "one"):
        if name == "one":
            model = called = layers()
            optimizer = mofasgd(model, process_group=alone())
        else:
            model, called, optimizer = made(name)
        norms = []
        for tokens, targets in plenty(4):
            optimizer.zero_grad()
            world, rank = (1, 0) if name == "one" else (dist.get_world_size(), dist.get_rank())
            for i, part in enumerate(zip(tokens.chunk(2), targets.chunk(2))):
                called(*(whole.chunk(world)[rank] for whole in part)).backward()
                if i == 0:
                    norms.append(number(clipping(model)()))
            norms.append(number(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)))
            optimizer.step()
        results.append({"norms": norms, "weights": whole(model)})
    return {"ranks": results[0], "one": results[1]}


def tied_under_ddp() -> dict:
    model = toy(Tied)
    optimizer = mofasgd(model, include=["^embed"])
    return train(DistributedDataParallel(model), optimizer, micro=3, clip=clipping(model))


def assert_clipped(ran, wanted: dict) -> None:
    assert_same(ran, wanted)
    for result in ran.ranks:
        assert torch.allclose(torch.tensor(result["norms"]), torch.tensor(wanted["norms"]), rtol=1e-5, atol=0)
        assert equal(result["norms"], ran.ranks[0]["norms"])
        assert equal(result["weights"], ran.ranks[0]["weights"])


@on_ranks(clipped, pairwise=True, world=[2, 3], engine=ENGINES, foreach=[None, False, True], micro=[1, 3])
def test_torch_s_clipping_agrees_with_the_dense_reference(ran):
    assert_clipped(ran, dense(Layers, data=plenty, clip=TIGHT))
    with pytest.raises(AssertionError):
        assert_clipped(ran, dense(Layers, data=plenty))


@on_ranks(by_the_optimizer, engine=ENGINES)
def test_the_optimizer_s_own_clipping_agrees(ran):
    assert_clipped(ran, dense(Layers, data=plenty, clip=TIGHT))


@on_ranks(clipped_apart, engine=ENGINES, foreach=[None, True])
def test_clipping_by_groups_agrees(ran):
    assert_clipped(ran, dense(Layers, data=plenty, clip=TIGHT, clip_apart=("feed.",)))
    with pytest.raises(AssertionError):
        assert_same(ran, dense(Layers, data=plenty, clip=TIGHT))


@on_ranks(zeroed, engine=ENGINES, to_none=[True, False])
def test_the_model_s_zero_grad_drops_the_sketches(ran):
    assert_clipped(ran, dense(Layers, data=plenty, clip=TIGHT))


@on_ranks(scaled, {"engine": "ddp"}, {"engine": "fsdp2"}, world=[2, 3], pairwise=True)
def test_a_grad_scaler_is_honoured(ran):
    assert_clipped(ran, dense(Layers, data=plenty, clip=TIGHT))


@on_ranks(overflowing, engine=ENGINES, rank=[0, 1])
def test_a_grad_scaler_skips_a_step_on_all_ranks(ran):
    for result in ran.ranks:
        assert result["scale"] == 512.0 and result["steps"] == 0
        assert equal(result["before"], result["after"])


@on_ranks(without_a_number, engine=ENGINES, clip=[False, True])
def test_a_nan_on_one_rank_skips_the_step_on_all(ran):
    for result in ran.ranks:
        assert result["skipped"] == 1 and result["steps"] == 2
        assert equal(result["before"], result["after"])
        assert not equal(result["before"], result["end"])
        assert all(weight.isfinite().all() for weight in result["end"].values())
        assert equal(result["end"], ran.ranks[0]["end"])


@on_ranks(clipped_between, engine=ENGINES)
def test_what_comes_after_a_clipping_counts_unclipped(ran):
    for result in ran.ranks:
        ranks, one = result["ranks"], result["one"]
        assert ranks["norms"] == pytest.approx(one["norms"], rel=1e-5)
        for name, weight in one["weights"].items():
            assert float((ranks["weights"][name] - weight).norm()) < 1e-5 * float(weight.norm()), name


@on_ranks(tied_under_ddp)
def test_a_matrix_that_gets_real_gradients_too_agrees(ran):
    assert_clipped(ran, dense(Tied, data=plenty, matrices=("embed.weight", *Tied.MATRICES), clip=TIGHT))
