"""AdamW's part on a stream of its own, beside the factor update: bit for bit what one after the other gives."""

import contextlib

import pytest
import torch
from torch import nn

from ds_mofa import MoFaSGD
from ds_mofa.optimizers import base

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCABULARY = 200_000  # so many rows that AdamW is still at it when the factors are done


@contextlib.contextmanager
def after_one_another(adamw, joined):
    yield


def trained(steps=6):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(VOCABULARY, 256), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 64)).cuda()
    optimizer = MoFaSGD(net, lr=1e-3, rank=8)
    streams = []
    optimizer.adamw.register_step_post_hook(lambda *_: streams.append(torch.cuda.current_stream()))
    losses = []
    for step in range(steps):
        ids = torch.randint(VOCABULARY, (512,), device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        loss = net(ids).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), [param.detach().clone() for param in net.parameters()], streams


def test_it_changes_no_bit(monkeypatch):
    losses, weights, streams = trained()
    main = torch.cuda.current_stream()
    assert streams[0] == main, "the moments come from the blocks of all else"
    assert all(stream != main for stream in streams[1:])
    monkeypatch.setattr(base, "beside", after_one_another)
    expected, others, streams = trained()
    assert all(stream == main for stream in streams)
    assert torch.equal(losses, expected)
    assert all(torch.equal(weight, other) for weight, other in zip(weights, others, strict=True))


def test_it_takes_no_memory():
    peaks = []
    for steps in (3, 6):
        trained(1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        trained(steps)
        peaks.append(torch.cuda.max_memory_reserved())
    assert peaks[0] == peaks[1]
