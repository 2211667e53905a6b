"""Layers that Inductor compiles have their sketches taken together, and they are those of the eager model."""

import pytest
import torch
from torch import nn

from ds_mofa import MoFaSGD
from ds_mofa.capture.queue import Queue

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.square, self.down = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        z = self.norm(x)
        return x + self.down(torch.tanh(self.square(torch.sigmoid(self.gate(z)) * self.up(z))))


def sketched(compiled: bool) -> tuple[torch.Tensor, list[int]]:
    """The sketches after two backwards of three layers, and how many linears each launch took."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Layer(256) for _ in range(3)]).to("cuda", torch.bfloat16)
    optimizer = MoFaSGD(model, lr=1e-3, rank=8)
    sizes, launch = [], Queue.launch

    def counting(self, work):
        sizes.append(len(work))
        launch(self, work)

    if compiled:
        torch._dynamo.reset()
        for layer in model:
            layer.compile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Queue, "launch", counting)
        for seed in range(2):
            x = torch.randn(2, 96, 256, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)
            model(x).float().square().mean().backward()
    return optimizer.matrices.sketches.clone(), sizes


def test_a_compiled_layer_is_one_launch():
    expected, _ = sketched(compiled=False)
    found, sizes = sketched(compiled=True)
    assert sizes == [4] * 6
    assert expected.any() and (found - expected).norm() < 2e-2 * expected.norm()
