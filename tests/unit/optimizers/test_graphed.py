"""GraphedMicroBatch on a CPU, where every call is eager; what it captures is tested in tests/gpu."""

from unittest import mock

import pytest
import torch
from torch import nn

from ds_mofa import GraphedMicroBatch, MoFaSGD


def losses(graphed: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    optimizer = MoFaSGD(model, lr=1e-2, rank=4, adjust_lr_fn="adamw")

    def loss_of(x, *, scale):
        return (model(x) - x).square().mean() * scale

    micro_batch = GraphedMicroBatch(loss_of, optimizer)
    found = []
    for step in range(6):
        for i in range(2):
            x = torch.randn(8 + step, 16, generator=torch.Generator().manual_seed(10 * step + i))
            if graphed:
                found.append(micro_batch(x, scale=0.5))
            else:
                loss = loss_of(x, scale=0.5)
                loss.backward()
                found.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(found)


def test_it_is_the_loop_without_it():
    found = losses(graphed=True)
    assert torch.equal(found, losses(graphed=False))
    assert not found.requires_grad


def test_several_processes_are_refused():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters())
    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.get_world_size", return_value=2),
        pytest.raises(RuntimeError, match="one process"),
    ):
        GraphedMicroBatch(model, optimizer)
