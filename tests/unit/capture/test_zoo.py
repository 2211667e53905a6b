"""Every way to use a weight, both captures: the sketches are those of autograd's gradient, and nothing else has one."""

import copy

import pytest
import torch

from ds_mofa import MoFaSGD
from tests.unit.dense_reference import relative_error
from tests.zoo import WAYS, Zoo, inputs

CAPTURES = pytest.mark.parametrize("capture", ["linear", "hook"])


def pair(capture, dtype=torch.float32):
    """The net, one that torch alone trains, and the optimizer of the first."""
    torch.manual_seed(0)
    net = Zoo().to(dtype)
    plain = copy.deepcopy(net)
    return net, plain, MoFaSGD(net, rank=4, capture=capture, include=Zoo.INCLUDE)


def check(plain, optimizer, tolerance):
    """The sketches against the plain net's gradients."""
    gradients = {name: param.grad for name, param in plain.named_parameters()}
    for matrix, sketch in zip(optimizer.split.matrices, optimizer.matrices.captured, strict=True):
        G = gradients[matrix.name]
        if G is None or not G.any():
            assert not sketch.Y.any() and not sketch.Z.any(), matrix.name
            assert G is not None or matrix.param.grad is None, matrix.name
            continue
        G = G.double()
        assert relative_error(sketch.Y, G @ sketch.V.double()) < tolerance, matrix.name
        assert relative_error(sketch.Z, G.mT @ sketch.U.double()) < tolerance, matrix.name
    matrices = {matrix.name for matrix in optimizer.split.matrices}
    for name, param in optimizer._model().named_parameters():
        if name not in matrices:
            other = gradients[name]
            assert (param.grad is None) == (other is None), name
            assert other is None or torch.allclose(param.grad, other, rtol=1e-4, atol=1e-6), name


@CAPTURES
@pytest.mark.parametrize("way", WAYS)
def test_the_sketches_are_those_of_autograd_s_gradient(way, capture):
    net, plain, optimizer = pair(capture)
    for some in (net, plain):
        some(inputs(), way).backward()
    check(plain, optimizer, 1e-6)


@CAPTURES
def test_ways_that_follow_one_another_add_up(capture):
    net, plain, optimizer = pair(capture, torch.float64)
    for some in (net, plain):
        for seed, way in enumerate(["one module twice", "an L2 penalty", "a parameter of its own", "a masked weight"]):
            some(inputs(seed, torch.float64), way).backward()
        loss = some(inputs(9, torch.float64), "one after the other")
        loss.backward(retain_graph=True)
        loss.backward()
    check(plain, optimizer, 1e-12)


def test_a_sketch_that_takes_autograd_grad_for_a_backward_is_far_outside(monkeypatch):
    """The control: what the tests above would see if the capture did not ask autograd."""
    monkeypatch.setattr("ds_mofa.capture.linear.wanted", lambda node: True)
    net, plain, optimizer = pair("linear")
    for some in (net, plain):
        some(inputs(), "after autograd.grad of the input").backward()
    with pytest.raises(AssertionError):
        check(plain, optimizer, 0.1)


@CAPTURES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_is_as_exact_as_its_dtype(weights, dtype, capture):
    net, plain, optimizer = pair(capture, weights)
    for some in (net, plain):
        with torch.autocast("cpu", dtype):
            loss = some.b(some.a(inputs(dtype=weights)).relu()).float().square().mean()
        loss.backward()
    check_names = {"a.weight", "b.weight"}
    for matrix, sketch in zip(optimizer.split.matrices, optimizer.matrices.captured, strict=True):
        if matrix.name in check_names:
            G = plain.get_parameter(matrix.name).grad.double()
            assert relative_error(sketch.Y, G @ sketch.V.double()) < 2e-2, matrix.name


@CAPTURES
def test_a_dtype_that_does_not_fit_is_refused_in_training_as_in_evaluation(capture):
    net, _, _ = pair(capture)
    x = inputs(dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):
        net.a(x)
    with pytest.raises(RuntimeError, match="same dtype"):
        net.a(x)


def test_the_input_may_be_named():
    net, plain, _ = pair("linear")
    assert torch.equal(net.a(input=inputs()), plain.a(input=inputs()))
