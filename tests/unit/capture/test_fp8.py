"""Linears whose forward and dX are taken in floats of eight bits: the rest of the training is what it was."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ds_mofa import GaLore, MoFaSGD, OptionError
from ds_mofa.kernels import fp8
from tests import autoencoding


def model(bias=True, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64, bias=bias), nn.Tanh(), nn.Linear(64, 32, bias=bias)).to(dtype)


def batch(tokens=24):
    return torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(1)).bfloat16()


def sketches(optimizer):
    return [part.clone() for sketch in optimizer.matrices.captured for part in (sketch.Y, sketch.Z)]


@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_dx_are_in_eight_bits_and_the_sketches_are_not(bias):
    net = model(bias)
    first, _, second = net
    optimizer = MoFaSGD(net, lr=1e-3, rank=4, fp8=True)
    x = batch().requires_grad_()
    hidden = first(x)
    hidden.retain_grad()
    y = second(hidden)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    y.backward(dy)

    expected, scales = fp8.product(hidden, second.weight)
    assert torch.equal(y, expected + second.bias if bias else expected)
    assert torch.equal(hidden.grad, fp8.input_gradient(dy, second.weight, scales))
    assert torch.equal(x.grad, fp8.input_gradient(hidden.grad, first.weight, fp8.product(x, first.weight)[1]))
    sketch = optimizer.matrices.captured[1]
    G = dy.double().flatten(0, 1).mT @ hidden.detach().double().flatten(0, 1)
    for found, exact in ((sketch.Y, G @ sketch.V.double()), (sketch.Z, G.mT @ sketch.U.double())):
        assert (found.double() - exact).norm() < 0.01 * exact.norm()
    if bias:
        torch.testing.assert_close(second.bias.grad.float(), dy.float().sum((0, 1)), rtol=0.02, atol=0.05)


def test_it_learns_as_without():
    losses = {}
    for eight in (False, True):
        net = model()
        optimizer = MoFaSGD(net, lr=1e-3, rank=8, explore=8, fp8=eight)
        losses[eight] = autoencoding.losses(net, optimizer, batch(64), 40)
    assert losses[False][-1] < 0.7 * losses[False][0]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[True] != losses[False]


def test_evaluation_is_exact():
    net = model()
    exact = copy.deepcopy(net)
    optimizer = MoFaSGD(net, lr=1e-3, rank=4, fp8=True)  # the model is as before when this is gone
    with torch.no_grad():
        assert torch.equal(net(batch()), exact(batch()))
    assert not torch.equal(net(batch()), exact(batch())) and optimizer.options.fp8


def test_what_include_names_and_what_has_an_uneven_side_are_multiplied_as_without():
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "named": nn.Linear(32, 32),
            "uneven": nn.Linear(32, 40),
            "eight": nn.Linear(32, 48),
            "embed": nn.Embedding(64, 32),
        }
    ).bfloat16()
    exact = copy.deepcopy(net)
    optimizer = MoFaSGD(net, lr=1e-3, rank=4, fp8=True, include=["named", "embed"], exclude=["bias"])
    x = batch()
    same = {name: torch.equal(net[name](x), exact[name](x)) for name in ("named", "uneven", "eight")}
    assert same == {"named": True, "uneven": True, "eight": False} and optimizer.options.fp8


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_it_is_the_same(reentrant):
    found = []
    for checkpointed in (False, True):
        net = model()
        optimizer = MoFaSGD(net, lr=1e-3, rank=4, fp8=True)
        x = batch().requires_grad_()
        y = checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)
        y.backward(torch.ones_like(y))
        found.append((x.grad, *sketches(optimizer)))
    for plain, recomputed in zip(*found):
        assert torch.equal(plain, recomputed)


def test_compiled_it_is_the_same():
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = model()
        optimizer = MoFaSGD(net, lr=1e-3, rank=4, fp8=True)
        x = batch().requires_grad_()
        y = (torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net)(x)
        y.backward(torch.ones_like(y))
        found.append((y.detach(), x.grad, *sketches(optimizer)))
    for plain, traced in zip(*found):
        torch.testing.assert_close(traced.float(), plain.float(), rtol=0.01, atol=0.01)


def test_under_autocast_fp32_weights_serve():
    net = model(dtype=torch.float32)
    optimizer = MoFaSGD(net, lr=1e-3, rank=4, fp8=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(batch().float())
    y.sum().backward()
    assert all(part.any() for part in sketches(optimizer))
    with pytest.raises(RuntimeError, match="got torch.float32"):
        net(batch().float())


def test_weights_that_are_kept_in_eight_bits_are_rounded_from_there():
    net = model(bias=False)
    optimizer = MoFaSGD(net, lr=1e-3, rank=4, fp8=True, weights="int8")
    x = batch().requires_grad_()
    y = net[0](x)
    expected, scales = fp8.product(x, net[0].weight.widened())
    assert torch.equal(y, expected)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, fp8.input_gradient(torch.ones_like(y), net[0].weight.widened(), scales))
    optimizer.step()


def test_galore_has_it_too():
    net = model()
    optimizer = GaLore(net, lr=1e-3, rank=4, fp8=True)
    exact = copy.deepcopy(model())
    assert not torch.equal(net(batch()), exact(batch())) and optimizer.options.fp8
    net(batch()).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"capture": "hook"}, torch.bfloat16, "capture='hook' captures none"),
        ({}, torch.float16, "the products are bf16, and the weights torch.float16"),
        ({}, torch.float64, "the products are bf16, and the weights torch.float64"),
    ],
)
def test_where_it_cannot_be_it_is_refused(options, dtype, message):
    with pytest.raises(OptionError, match=message):
        MoFaSGD(model(dtype=dtype), lr=1e-3, rank=4, fp8=True, **options)


@pytest.mark.parametrize("kind", ["uneven", "included", "not a linear"])
def test_a_model_without_a_linear_for_it_is_refused(kind):
    """It would be asked for, and do nothing."""
    net = {
        "uneven": lambda: nn.Sequential(nn.Linear(40, 24)),
        "included": lambda: nn.Sequential(nn.Linear(32, 32)),
        "not a linear": lambda: nn.Sequential(Conv1D(32, 48), nn.ReLU()),
    }[kind]().bfloat16()
    options = {"include": ["0.weight"]} if kind == "included" else {}
    with pytest.raises(OptionError, match="this model's matrices have none. Leave it out"):
        MoFaSGD(net, lr=1e-3, rank=4, fp8=True, **options)
    MoFaSGD(net, lr=1e-3, rank=4, **options)  # the model is as it was


def test_the_table_says_so(capsys):
    MoFaSGD(model(), lr=1e-3, rank=4, fp8=True)
    captured = capsys.readouterr()
    assert "products in fp8" in captured.out + captured.err
