"""Within torch.compile the sketches of several linears are one call, of the same sums."""

import re

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from ds_mofa import MoFaSGD
from ds_mofa.capture import together
from ds_mofa.capture.queue import Queue
from tests.unit.capture.queues import QueueOnACPU


class Layer(nn.Module):
    """A norm, three linears with the same input, one after them, and one whose output is the layer's."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate, self.side = (nn.Linear(width, 2 * width, bias=i > 0) for i in range(3))
        self.square, self.down = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        z = self.norm(x)
        z = torch.sigmoid(self.gate(z)) * self.up(z) + self.side(z)
        return x + self.down(torch.tanh(self.square(z)))


class Again(nn.Module):
    """One of three linears is used twice."""

    def __init__(self):
        super().__init__()
        self.square, self.out, self.side = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        return self.side(x) + self.out(torch.tanh(self.square(torch.tanh(self.square(x)))))


class Routed(nn.Module):
    """How many tokens its linears see is known when it runs."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        some = tokens.index_select(0, torch.nonzero(tokens[:, 0] > 0).squeeze(-1))
        return x + self.down(torch.tanh(self.up(some))).mean(0)


def joining(graph, inputs):
    """A compiler that does what the pass does, and nothing else."""
    together.Together()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return make_boxed_func(graph)


def trained(make, *, backend=None, frozen=(), tokens=(8,), dynamic=None):
    """Y and Z after a backward for each of ``tokens``, the weights after a step by them, and sizes of the launches."""
    torch.manual_seed(0)
    model = nn.Sequential(make(), make())
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    optimizer = MoFaSGD(model, lr=2e-3, rank=4)
    queue = QueueOnACPU(optimizer.matrices.captured)
    if backend is not None:
        torch._dynamo.reset()
        for layer in model:
            layer.compile(backend=backend, dynamic=dynamic)
    for seed, count in enumerate(tokens):
        x = torch.randn(2, count, 12, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
    found = [part.clone() for sketch in optimizer.matrices.captured for part in (sketch.Y, sketch.Z)]
    optimizer.step()
    return [*found, *(param.detach().clone() for param in model.parameters())], queue.sizes


def alone(graph, inputs):
    return make_boxed_func(graph)


JOINING = aot_autograd(fw_compiler=alone, bw_compiler=joining)


def check(make, sizes, *, backend=JOINING, **of_run):
    expected, _ = trained(make, **of_run)
    found, launches = trained(make, backend=backend, **of_run)
    assert sorted(launches) == sorted(sizes)
    for one, other in zip(found, expected, strict=True):
        assert other.any() and (one - other).norm() <= 1e-5 * other.norm()


def test_a_layer_is_one_call():
    check(Layer, [5, 5])


def test_it_is_one_for_each_backward():
    check(Layer, [5, 5] * 3, tokens=(8, 8, 8))


def test_lengths_may_differ():
    check(Layer, [5, 5] * 3, tokens=(8, 5, 11), dynamic=True)


def test_lengths_may_be_unknown():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(Routed, [2, 2] * 2, tokens=(8, 5))


def test_a_frozen_linear_has_no_part_in_it():
    check(Layer, [5, 4], frozen=["0.gate.weight"])


def test_a_linear_that_is_used_again_has_a_call_for_each_use():
    """A launch reads the sums of all before it writes one."""
    check(Again, [2, 1, 1] * 2)


def test_no_more_wait_than_a_queue_lets(monkeypatch):
    monkeypatch.setattr(Queue, "COUNT", 3)
    check(Layer, [3, 2] * 2)


def test_no_more_bytes_wait_than_a_queue_lets(monkeypatch):
    """Of 16 tokens in fp32, 12 and 24 wide: ``down``, ``square`` and the first of the others are above 8000 bytes."""
    monkeypatch.setattr(Queue, "BYTES", 7000)
    check(Layer, [3, 2] * 2)


def test_a_pass_of_somebody_elses_stays():
    def theirs(graph):
        pass

    with config.patch(post_grad_custom_post_pass=theirs):
        together.install()
        assert config.post_grad_custom_post_pass is theirs


def test_it_is_there_where_none_stands_and_there_once():
    with config.patch(post_grad_custom_post_pass=None):
        together.install()
        first = config.post_grad_custom_post_pass
        together.install()
        assert isinstance(first, together.Together) and config.post_grad_custom_post_pass is first


@pytest.mark.slow  # a C++ compiler takes half a minute
@pytest.mark.parametrize(("make", "sizes"), [(Layer, [5, 5]), (Again, [2, 1, 1] * 2)])
def test_inductor_joins_them(make, sizes):
    """And leaves the keys where they are, which on a GPU are all that lies on the host."""
    with config.patch(post_grad_custom_post_pass=together.Together()):
        _, codes = run_and_get_code(check, make, sizes, backend="inductor")
    calls = [line for code in codes for line in code.splitlines() if "ds_mofa.add_linears" in line]
    assert calls and not any(re.search(r"empty_strided.*int64", code) for code in codes)
