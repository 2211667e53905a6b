"""A matrix may be a slice of a stacked parameter: the step moves it as it moves a parameter of its own."""

import pytest
import torch
from torch import nn

from ds_mofa.options import Options
from ds_mofa.parameters import Matrix
from ds_mofa.rules.mofasgd import MoFaSGDRule
from ds_mofa.step.backend import OneProcess
from ds_mofa.step.step import MatrixStep

SHAPE = (3, 11, 8)
GROUPS = [{"lr": 0.1, "weight_decay": 0.1}]


def _step(matrices, **options):
    options = Options(rank=4, **options)
    return MatrixStep(matrices, options, MoFaSGDRule(options), OneProcess(torch.device("cpu")))


def _train(step, gradients):
    for some in gradients:
        for sketch, grad in zip(step.captured, some, strict=True):
            sketch.add_gradient(grad)
        step.reduce()
        step.update(GROUPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("master_weights", [False, True], ids=["", "masters"])
def test_slices_move_as_parameters_do(dtype, master_weights):
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(SHAPE).to(dtype))
    alone = [nn.Parameter(part.clone()) for part in stack.data]
    gradients = [torch.randn(SHAPE).to(dtype) for _ in range(4)]
    slices = [Matrix(f"stack[{e}]", stack, SHAPE[1:], (), 0, e, part=e) for e in range(3)]
    whole = [Matrix(f"alone{e}", param, SHAPE[1:], (), 0, e) for e, param in enumerate(alone)]
    before = stack.detach().clone()
    _train(_step(slices, master_weights=master_weights), gradients)
    _train(_step(whole, master_weights=master_weights), gradients)
    assert torch.equal(stack, torch.stack(list(alone)))
    assert not torch.equal(stack, before)


def test_a_slice_knows_where_it_begins():
    stack = nn.Parameter(torch.arange(24.0).view(2, 3, 4))
    second = Matrix("second", stack, (3, 4), (), 0, 0, part=1)
    assert second.start == 12 and second.weight[0, 0] == 12
    first = Matrix("first", nn.Parameter(torch.ones(3, 4)), (3, 4), (), 0, 0)
    assert first.start == 0 and first.weight.shape == (3, 4)
