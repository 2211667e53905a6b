"""Embeddings as matrices, alone and tied to the head, train like one process with dense float64 matrices."""

from unittest import mock

import pytest
from comparing import assert_same, dense
from engines import mofasgd, shard, train
from launching import on_ranks
from torch.nn.parallel import DistributedDataParallel
from toys import Lookup, TiedLookup, plenty
from training import config, toy
from training import train as train_by_deepspeed

from ds_mofa.capture.sketch import Sketch

MODELS = {"scaled": Lookup, "tied": TiedLookup}


def without_gradients():
    """Within: no matrix may get a gradient from autograd, but for the kernel of Layers, which is no module's."""
    sketched = Sketch.add_gradient

    def add_gradient(self, grad):
        assert len(grad) <= 35, "the gradient of an embedding was formed"
        sketched(self, grad)

    return mock.patch.object(Sketch, "add_gradient", add_gradient)


def by_zero(kind: str, stage: int, **options) -> dict:
    model = toy(MODELS[kind])
    settings = config(stage, micro=3, options={"include": model.INCLUDE, **options})
    with without_gradients():
        return train_by_deepspeed(settings, 5, data=plenty(6), model=model)


def by_torch(kind: str, engine: str, **options) -> dict:
    model = toy(MODELS[kind])
    wrapped = shard(model) if engine == "fsdp2" else model
    optimizer = mofasgd(model, include=model.INCLUDE, **options)
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    with without_gradients():
        return train(wrapped, optimizer, micro=3)


def explored_by_zero(stage: int) -> dict:
    return by_zero("scaled", stage, explore=2)


def explored_by_fsdp2() -> dict:
    return by_torch("scaled", "fsdp2", explore=2)


def with_the_padding_in_the_sketches() -> dict:
    with mock.patch("ds_mofa.capture.embedding._counted", lambda ctx, ids, dy: dy):
        return by_zero("scaled", 2)


def check(ran, kind: str, **settings) -> None:
    model = MODELS[kind]
    assert_same(ran, dense(model, data=plenty, **settings))
    momentum = ran.ranks[0]["momenta"]["embed.weight"]
    assert not momentum[list(model.STILL)].any()


@on_ranks(by_zero, kind=["scaled", "tied"], stage=[2, 3])
def test_under_zero(ran):
    check(ran, ran.kind)


@on_ranks(by_torch, kind=["scaled", "tied"], engine=["fsdp2", "ddp"])
def test_without_deepspeed(ran):
    check(ran, ran.kind)


@on_ranks(explored_by_zero, stage=[3])
def test_explored_under_zero(ran):
    check(ran, "scaled", explore=2)


@on_ranks(explored_by_fsdp2)
def test_explored_under_fsdp2(ran):
    check(ran, "scaled", explore=2)


def gathered_in_backward(kind: str, capture: str) -> dict:
    """Whether the embedding is there when its gradient comes, of each backward."""
    found = []
    rows, gradient = Sketch.add_rows, Sketch.add_gradient

    def looked_at(method):
        def add(self, *args):
            if self.param is not None and self.param.ds_shape.numel() == 61 * 35:
                found.append(str(self.param.ds_status))
            return method(self, *args)

        return add

    with (
        mock.patch.object(Sketch, "add_rows", looked_at(rows)),
        mock.patch.object(Sketch, "add_gradient", looked_at(gradient)),
    ):
        model = toy(MODELS[kind])
        settings = config(3, options={"include": model.INCLUDE, "capture": capture})
        ran = train_by_deepspeed(settings, 3, data=plenty(4), model=model)
    return {**ran, "found": found}


@on_ranks(gathered_in_backward, kind=["scaled"], capture=["linear", "hook"])
def test_an_embedding_is_not_gathered_for_a_backward_that_needs_no_weight(ran):
    wanted = "NOT_AVAILABLE" if ran.capture == "linear" else "AVAILABLE"
    for result in ran.ranks:
        assert len(result["found"]) == 3 and {status.rpartition(".")[2] for status in result["found"]} == {wanted}


@on_ranks(with_the_padding_in_the_sketches)
def test_what_torch_leaves_out_would_be_seen(ran):
    """The control."""
    with pytest.raises(AssertionError):
        check(ran, "scaled")
