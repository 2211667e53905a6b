"""torch.compile with its own code generator, of which the sketches are no part. Other tests compile by ``aot_eager``."""

import pytest
import torch
from torch import nn

from ds_mofa import MoFaSGD


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def sketched(backend: str | None) -> list[torch.Tensor]:
    """Y and Z of each matrix after two backwards, and the weights after a step by them."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(12), Block(12))
    optimizer = MoFaSGD(model, lr=2e-3, rank=4)
    if backend is not None:
        for block in model:
            block.compile(backend=backend)
    for seed in range(2):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
    found = [part.clone() for sketch in optimizer.matrices.captured for part in (sketch.Y, sketch.Z)]
    optimizer.step()
    return [*found, *(param.detach().clone() for param in model.parameters())]


@pytest.mark.slow  # a C++ compiler takes half a minute
def test_inductor_fills_the_sketches_as_eager_code_does():
    """In torch 2.11 it took copies of arguments that are views into a buffer from the wrong place."""
    for one, other in zip(sketched("inductor"), sketched(None), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_the_graph_has_no_part_in_the_sketches():
    """Whatever a compiler does with views that are written in place, it cannot do to these."""
    graphs = []

    def looking(graph, inputs):
        graphs.append([tuple(one.shape) for one in inputs if isinstance(one, torch.Tensor)])
        return graph.forward

    torch.manual_seed(0)
    block = Block(12)
    optimizer = MoFaSGD(block, lr=2e-3, rank=4)
    block.compile(backend=looking)
    block(torch.randn(16, 12)).square().mean().backward()
    shapes = [shape for graph in graphs for shape in graph]
    assert (36, 12) in shapes  # the weight: these are all inputs
    assert not {(36, 4), (12, 4)} & set(shapes)
    assert optimizer.matrices.captured[0].Y.any()
