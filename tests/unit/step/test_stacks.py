"""A parameter may be a stack of matrices: the step moves each as it moves a parameter of its own."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ds_mofa.kernels.shard import Shard, runs
from ds_mofa.options import GaLoreOptions, Options
from ds_mofa.parameters import Matrix
from ds_mofa.rules.galore import GaLoreRule
from ds_mofa.rules.mofasgd import MoFaSGDRule
from ds_mofa.step.backend import OneProcess
from ds_mofa.step.step import MatrixStep

SHAPE = (3, 11, 8)
GROUPS = [{"lr": 0.1, "weight_decay": 0.1}]


class Cut(OneProcess):
    """As of one process of several: it holds elements [low, high) of every parameter, of all numbers in a row."""

    def __init__(self, low, high):
        super().__init__(torch.device("cpu"))
        self.low, self.high = low, high

    def shard_of(self, matrix):
        start, size = (0, SHAPE[1] * SHAPE[2]) if matrix.stack is None else (0, matrix.numel)
        first = matrix.index * size if matrix.stack is None else start
        low, high = (min(max(bound - first, 0), size) for bound in (self.low, self.high))
        return Shard(matrix.param.data.view(-1)[low:high], low)


def stacked(param, **more):
    return [Matrix("stack", param, SHAPE[1:], (), 0, 0, stack=SHAPE[0], **more)]


def alone(params, **more):
    return [Matrix(f"alone{e}", param, SHAPE[1:], (), 0, e, **more) for e, param in enumerate(params)]


def step_of(matrices, backend=None, kind=Options, **options):
    options = kind(rank=4, **options)
    rule = MoFaSGDRule(options) if kind is Options else GaLoreRule(options)
    return MatrixStep(matrices, options, rule, backend or OneProcess(torch.device("cpu")))


def train(step, gradients):
    for some in gradients:
        for sketch, grad in zip(step.captured, some, strict=True):
            sketch.add_gradient(grad)
        step.reduce()
        step.update(GROUPS)


def begin_alike(one, other):
    """A stack's test matrices are drawn at once, and those of parameters one by one."""
    for e, sketch in enumerate(other.captured):
        sketch.U.copy_(one.captured[0].U[e])
        sketch.V.copy_(one.captured[0].V[e])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"master_weights": True}, {"explore": 2, "balance": 0.5}, {"update_bytes": 1e4}],
    ids=["plain", "masters", "explore", "sub-batches"],
)
@pytest.mark.parametrize("held", [None, (40, 200)], ids=["whole", "a part"])
def test_a_stack_moves_as_parameters_do(dtype, options, held):
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(SHAPE).to(dtype))
    params = [nn.Parameter(part.clone()) for part in stack.data]
    gradients = [torch.randn(SHAPE).to(dtype) for _ in range(4)]
    gradients[2][1] = 0  # an expert that no token went to
    before = stack.detach().clone()
    one, other = (step_of(some, held and Cut(*held), **options) for some in (stacked(stack), alone(params)))
    begin_alike(one, other)
    train(one, [[some] for some in gradients])
    train(other, gradients)
    assert torch.equal(stack, torch.stack(list(params)))
    moved = (stack != before).flatten()
    low, high = held or (0, stack.numel())
    assert not moved[:low].any() and not moved[high:].any() and moved[low:high].float().mean() > 0.5
    for name in ("U", "V", "sigma"):
        whole = one.state_dict()["matrices"]["stack"][name]
        assert torch.equal(whole, torch.stack([own[name] for own in other.state_dict()["matrices"].values()]))


def test_galore_moves_a_stack_as_parameters():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(SHAPE))
    params = [nn.Parameter(part.clone()) for part in stack.data]
    gradients = [torch.randn(SHAPE) for _ in range(3)]
    gradients[1][2] = 0
    settings = {"kind": GaLoreOptions, "refresh_every": 10}
    one, other = (step_of(some, **settings) for some in (stacked(stack), alone(params)))
    begin_alike(one, other)
    train(one, [[some] for some in gradients])
    train(other, gradients)
    torch.testing.assert_close(stack.data, torch.stack(list(params)), rtol=1e-6, atol=1e-7)
    state = one.state_dict()["matrices"]["stack"]
    assert state["gradients"].flatten().tolist() == [3, 3, 2] and state["P"].shape == (3, 8, 4)


def test_a_matrix_of_a_stack_that_gets_no_gradient_stays():
    stack = nn.Parameter(torch.randn(SHAPE))
    before = stack.detach().clone()
    gradients = [torch.randn(SHAPE) * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1) for _ in range(3)]
    train(step_of(stacked(stack)), [[some] for some in gradients])
    assert torch.equal(stack[1], before[1])
    assert not torch.equal(stack[0], before[0]) and not torch.equal(stack[2], before[2])


def test_a_stack_is_loaded_at_another_rank_and_of_another_owner():
    torch.manual_seed(1)
    gradients = [[torch.randn(SHAPE)] for _ in range(3)]
    weights = torch.randn(SHAPE)
    one, other = (step_of(stacked(nn.Parameter(weights.clone()))) for _ in range(2))
    train(one, gradients)
    other.members[0].param.data.copy_(one.members[0].param.data)
    other.load_state_dict(one.state_dict())
    for step in (one, other):
        train(step, gradients)
    assert torch.equal(one.members[0].param, other.members[0].param)
    wide = MatrixStep(
        stacked(nn.Parameter(weights.clone())), Options(rank=6), MoFaSGDRule(Options(rank=6)), one.backend
    )
    wide.load_state_dict(one.state_dict())
    state = wide.state_dict()["matrices"]["stack"]
    assert state["U"].shape == (3, 11, 6) and torch.equal(
        state["sigma"][:, :4], one.state_dict()["matrices"]["stack"]["sigma"]
    )
    with pytest.raises(ValueError, match=r"U of 'stack' is \(3, 11, 4\), this model's would be \(2, 11, 4\)"):
        step_of([Matrix("stack", nn.Parameter(weights[:2].clone()), SHAPE[1:], (), 0, 0, stack=2)]).load_state_dict(
            one.state_dict()
        )


def test_a_stack_is_measured_as_one():
    step = step_of(stacked(nn.Parameter(torch.randn(SHAPE))), diagnostics_every=2)
    gradients = [[torch.randn(SHAPE) * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)] for _ in range(2)]
    train(step, gradients)
    measures = step.report.by_matrix()
    assert list(measures) == ["stack"]
    assert 0 < measures["stack"]["kept_energy"] < 1  # of the two that move: the third keeps all of nothing
    assert 1 < measures["stack"]["effective_rank"] <= 4
    assert measures["stack"]["projected_grad_norm"] == pytest.approx(float(step.norm), rel=1e-6)


def test_a_stack_has_one_norm():
    step = step_of(
        [*stacked(nn.Parameter(torch.randn(SHAPE))), Matrix("alone", nn.Parameter(torch.randn(9, 7)), (9, 7), (), 0, 1)]
    )
    for sketch in step.captured:
        sketch.add_gradient(torch.randn_like(sketch.param))
    step.reduce()
    norms = step.norms()
    assert norms.shape == (2,)
    torch.testing.assert_close(norms.square().sum().sqrt(), step.norm, rtol=1e-6, atol=0)


@given(
    start=st.integers(0, 60),
    numel=st.integers(0, 60),
    size=st.integers(1, 13),
    first=st.integers(0, 6),
    count=st.integers(0, 6),
)
def test_runs_are_what_is_held_of_some_matrices(start, numel, size, first, count):
    last = first + count
    wanted = [i for i in range(start, start + numel) if first * size <= i < last * size]
    found, places = [], []
    for run in runs(start, numel, size, first, last):
        assert run.count == 1 or run.start == 0 and run.length == size
        flat = run.cut(torch.arange(start, start + numel)).view(run.count, run.length)
        for number, row in zip(itertools.count(run.first), flat.tolist()):
            assert row == list(range(number * size + run.start, number * size + run.start + run.length))
            found += row
        places.append(run.first)
    assert found == wanted and places == sorted(set(places))
    assert len(places) <= 3
