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


def trained(between, *, replayed):
    """Weights after three steps of two backwards, the first or the second of which is a graph's replay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).double()
    optimizer = MoFaSGD(model, lr=1e-2, rank=4, adjust_lr_fn="adamw")
    sketches = optimizer.matrices.captured

    def backward(number):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number)).double()
        (model(x) - x).square().mean().backward()

    def replay(number):
        if not replayed:
            return backward(number)
        for sketch in sketches:  # where a graph's first call has put it
            sketch.param.grad = sketch.grad
        with mock.patch.object(type(sketches[0]), "open"):  # behind the back of what says that something was added
            backward(number)
        optimizer.replayed()

    for step in range(3):
        if between == "norm":
            backward(10 * step)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            replay(10 * step + 1)
        else:
            replay(10 * step)
            model.zero_grad()
            backward(10 * step + 1)
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("between", ["norm", "dropped"])
def test_what_a_replay_adds_is_seen(between):
    """After a norm was taken in the middle of a step, and where it is let go without the optimizer."""
    for one, other in zip(trained(between, replayed=False), trained(between, replayed=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
