"""docs/extending.md, "A capture", carried out: the sketches are those of autograd's gradient, which is never formed."""

import pytest
import torch
from torch import nn

from ds_mofa import MoFaSGD
from ds_mofa.capture.attach import CAPTURES
from tests.extending.toy_capture import Transposed, TransposedCapture


@pytest.fixture
def captured(monkeypatch):
    capture = TransposedCapture()
    monkeypatch.setattr("ds_mofa.capture.attach.CAPTURES", [capture, *CAPTURES])
    return capture


def _model():
    torch.manual_seed(0)
    return nn.Sequential(Transposed(7, 9), nn.Tanh(), Transposed(9, 5), nn.LayerNorm(5)).double()


def _backward(model, times=1):
    for number in range(times):
        x = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        model(x).square().sin().mean().backward()


@pytest.mark.parametrize("times", [1, 3])
def test_the_sketches_are_those_of_the_gradient(captured, times):
    model, plain = _model(), _model()
    optimizer = MoFaSGD(model, lr=0.02, adjust_lr_fn="adamw", rank=3, include=[r"^[02].weight"])
    _backward(model, times)
    _backward(plain, times)
    sketches = dict(zip((matrix.name for matrix in optimizer.split.matrices), optimizer.matrices.captured))
    assert set(sketches) == {"0.weight", "2.weight"}
    for name, sketch in sketches.items():
        G = plain.get_parameter(name).grad
        assert torch.allclose(sketch.Y, G @ sketch.V, rtol=1e-9, atol=1e-12)
        assert torch.allclose(sketch.Z, G.mT @ sketch.U, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(sketch.Y, 2 * G @ sketch.V, rtol=1e-3)  # the control


def test_no_gradient_is_formed(captured, monkeypatch):
    model = _model()
    MoFaSGD(model, lr=0.02, adjust_lr_fn="adamw", rank=3, include=[r"^[02].weight"])
    monkeypatch.setattr("ds_mofa.capture.sketch.Sketch.add_gradient", None)  # what the hook would call
    _backward(model)


def test_autograd_grad_gets_the_gradient_and_leaves_the_sketch(captured):
    model, plain = _model(), _model()
    optimizer = MoFaSGD(model, lr=0.02, adjust_lr_fn="adamw", rank=3, include=[r"^[02].weight"])
    x = torch.randn(4, 7, dtype=torch.float64)
    (ours,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    (theirs,) = torch.autograd.grad(plain(x).square().sum(), plain[0].weight)
    assert torch.allclose(ours, theirs) and not optimizer.matrices.sketches.any()


def test_it_is_undone(captured):
    model = _model()
    optimizer = MoFaSGD(model, lr=0.02, adjust_lr_fn="adamw", rank=3, include=[r"^[02].weight"])
    assert "forward" in vars(model[0])
    optimizer.detach()
    assert "forward" not in vars(model[0])
