"""The baselines under DDP, which gives every process the whole mean gradient: each does what one process would."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from launching import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ds_mofa import OptionError
from experiments import baselines

STEPS, BATCH = 6, 12
SETTINGS = {
    "GaLore": {"refresh_every": 3},
    "Fira": {"refresh_every": 3},
    "MLorc": {},
    "GUM": {"period": 3, "q": 0.5},
    "SO": {"density": 0.1, "refresh_every": 3},
}


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 6)).double()


def trained(name: str, rank: int, world: int, wrap: bool) -> dict[str, torch.Tensor]:
    """Each process on its part of the batches."""
    model = model_of()
    optimizer = baselines.build(name, model, lr=1e-2, adamw_lr=1e-3, rank=4, weight_decay=0.1, **SETTINGS[name])
    run = DistributedDataParallel(model) if wrap else model
    for step in range(STEPS):
        x = torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        run(x.chunk(world)[rank]).sin().mean().backward()
        optimizer.step()
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def shared(name: str) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        "together": trained(name, rank, world, wrap=True),
        "alone": trained(name, 0, 1, wrap=False),
        "apart": trained(name, rank, world, wrap=False),
    }


@on_ranks(shared, world=[2, 3], name=list(SETTINGS), pairwise=True)
def test_under_ddp_it_is_one_process(ran):
    for one, other in pairwise(ran.ranks):
        assert all(torch.equal(value, other["together"][key]) for key, value in one["together"].items())
    for result in ran.ranks:
        for key, wanted in result["alone"].items():
            torch.testing.assert_close(result["together"][key], wanted, rtol=1e-8, atol=1e-10)
        # Processes that do not tell each other their gradients come elsewhere.
        assert any(
            (result["apart"][key] - wanted).norm() > 1e-4 * wanted.norm() for key, wanted in result["alone"].items()
        )


def sketched(name: str) -> str:
    with pytest.raises(OptionError) as refused:
        baselines.build(name, model_of(), lr=1e-2, rank=4, sketched=True)
    return str(refused.value)


@on_ranks(sketched, name=["GaLore", "GUM"])
def test_what_is_captured_is_one_process_s(ran):
    assert all("sketched=True is for one process" in message for message in ran.ranks)
