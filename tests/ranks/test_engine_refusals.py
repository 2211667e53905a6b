"""What cannot be right without DeepSpeed is refused by name, on every rank, with the way out."""

import pytest
import torch
import torch.distributed as dist
from engines import built, layers, line, mofasgd, shard, square, step_on
from launching import on_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from toys import plenty


def wrapped_in_ddp() -> None:
    mofasgd(DistributedDataParallel(layers()))


def wrapped_in_ddp_and_its_module() -> None:
    model = layers()
    wrapped = DistributedDataParallel(model)
    step_on(wrapped, mofasgd(model), plenty(1)[0])


def a_part_that_ddp_wraps_later() -> None:
    """Around a module that holds the model: DDP asks that one for the names."""
    model = layers()
    optimizer = mofasgd(model)
    step_on(DistributedDataParallel(Around(model)), optimizer, plenty(1)[0])


def in_fsdp1() -> None:
    mofasgd(FullyShardedDataParallel(layers(), use_orig_params=True, device_id=torch.device("cpu")))


def sharded_later() -> None:
    model = layers()
    optimizer = mofasgd(model)
    step_on(shard(model), optimizer, plenty(1)[0])


def sharded_in_part_later() -> None:
    """Some of them: the others stay what they were."""
    model = layers()
    optimizer = mofasgd(model)
    fully_shard(model.feed, mesh=line())
    step_on(model, optimizer, plenty(1)[0])


def replaced_later() -> None:
    """In a sharded model, after its first step."""
    model, optimizer = built()
    batch, other = plenty(2)
    step_on(model, optimizer, batch)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    step_on(model, optimizer, other)


def replaced_later_in_whole_models() -> None:
    model = layers()
    optimizer = mofasgd(model)
    called = DistributedDataParallel(model)
    batch, other = plenty(2)
    step_on(called, optimizer, batch)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    step_on(called, optimizer, other)


def cut_by_columns() -> None:
    model = layers()
    shard(model, shard_placement_fn=lambda param: Shard(1) if param is model.place.weight else None)
    mofasgd(model)


def tensor_parallel() -> None:
    model = layers()
    mofasgd(parallelize_module(model, line(), {"feed.up": ColwiseParallel(), "feed.down": RowwiseParallel()}))


def reduced_by_nobody() -> None:
    model = layers()
    step_on(model, mofasgd(model), plenty(1)[0])


def with_8_bit_states() -> None:
    model, optimizer = built(options={"adamw_states": "8bit"})
    step_on(model, optimizer, plenty(1)[0])


def grown_later() -> None:
    model = layers()
    optimizer = mofasgd(model)
    model.gate.weight.data = torch.randn(5, 35)
    step_on(model, optimizer, plenty(1)[0])


class Around(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return self.model(*batch)


# Of each scene, what its message says: what is wrong, and what to do.
SAYS = {
    wrapped_in_ddp: (
        "DistributedDataParallel has wrapped this model already",
        "build the optimizer over the module first",
    ),
    wrapped_in_ddp_and_its_module: (
        "DistributedDataParallel reduces 'place.weight'",
        "Build the optimizer before DistributedDataParallel",
    ),
    a_part_that_ddp_wraps_later: (
        "DistributedDataParallel reduces 'model.place.weight'",
        "over the very module that it wraps",
    ),
    in_fsdp1: ("FullyShardedDataParallel (FSDP1) flattens the weights", "torch.distributed.fsdp.fully_shard"),
    sharded_later: ("fully_shard has put another parameter in the place of", "build it after fully_shard"),
    sharded_in_part_later: ("fully_shard has put another parameter in the place of 'feed.up.weight'", "build it after"),
    replaced_later: (
        "another parameter stands in the place of",
        "load_state_dict(assign=True)",
        "Build the optimizer after",
    ),
    replaced_later_in_whole_models: ("another parameter stands in the place of", "Build the optimizer after that"),
    cut_by_columns: ("'place.weight'", "is not cut by rows alone: leave shard_placement_fn out"),
    tensor_parallel: ("'feed.up.weight'", "Tensor parallelism is not served yet: exclude"),
    reduced_by_nobody: (
        "nobody adds them up",
        "wrap the model in DistributedDataParallel after the optimizer is built",
    ),
    with_8_bit_states: ("adamw_states",),
    grown_later: ("'gate.weight' was (4, 35) when the optimizer was built and is (5, 35) now", "build it after"),
}


def refused(what: str) -> dict:
    scene = {scene.__name__: scene for scene in SAYS}[what]
    with pytest.raises((RuntimeError, ValueError)) as raised:
        scene()
    return {"message": str(raised.value), "kind": type(raised.value).__name__}


@on_ranks(refused, what=[scene.__name__ for scene in SAYS])
def test_it_is_refused_by_name_with_the_way_out(ran):
    for result in ran.ranks:
        for words in {scene.__name__: says for scene, says in SAYS.items()}[ran.what]:
            assert words in result["message"], result


def tensor_parallel_under_fsdp2() -> dict:
    mesh = square()
    model = parallelize_module(layers(), mesh["shards"], {"feed.up": ColwiseParallel(), "feed.down": RowwiseParallel()})
    fully_shard(model.feed, mesh=mesh["replicas"])
    fully_shard(model, mesh=mesh["replicas"])
    with pytest.raises(ValueError, match="tensor parallelism") as raised:
        mofasgd(model)
    return {"message": str(raised.value)}


@on_ranks(tensor_parallel_under_fsdp2, world=[4])
def test_so_is_tensor_parallelism_under_fully_shard(ran):
    for result in ran.ranks:
        assert "'feed.up.weight'" in result["message"] and "exclude it" in result["message"]


def used_after_a_refusal() -> dict:
    """A refusal leaves nothing on the model: built the right way then, it trains."""
    model = shard(layers())
    with pytest.raises(ValueError, match="process_group"):
        mofasgd(model, process_group=dist.new_group([0]))
    step_on(model, mofasgd(model), plenty(1)[0])
    return {}


@on_ranks(used_after_a_refusal)
def test_a_refusal_leaves_the_model_as_it_was(ran):
    assert len(ran.ranks) == 2
