"""docs/extending.md, "A rule", carried out: one file, no change to the package, and it is an optimizer like the others."""

import copy

import pytest
import torch
from torch import nn

from ds_mofa.optimizers.registry import entry_of
from ds_mofa.rules.batch import Field
from tests.extending.toy_rule import Toy, ToyRule


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 14, bias=False), nn.LayerNorm(14)).double()


def _loss(model, step):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return model(x).square().sin().mean()


def _train(optimizer, model, steps):
    for step in steps:
        optimizer.zero_grad()
        _loss(model, step).backward()
        optimizer.step()


def _dense(model, psi, steps, *, lr, decay=0.0, sign=-1.0):
    """The method on whole gradients. ``sign`` is for the control."""
    rest = [p for name, p in model.named_parameters() if name not in psi]
    adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=decay)
    for step in steps:
        model.zero_grad()
        _loss(model, step).backward()
        adamw.step()
        for name, param in model.named_parameters():
            if name in psi:
                param.data.mul_(1 - lr * decay).add_(psi[name] @ (psi[name].mT @ param.grad), alpha=sign * lr)


def _psi(optimizer):
    return {
        matrix.name: sketch.U.clone() for matrix, sketch in zip(optimizer.split.matrices, optimizer.matrices.captured)
    }


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_the_dense_method(decay):
    model, dense, wrong = _model(), _model(), _model()
    optimizer = Toy(model, lr=0.3, rank=4, weight_decay=decay)
    psi = _psi(optimizer)
    assert set(psi) == {"0.weight", "2.weight"}
    _train(optimizer, model, range(6))
    _dense(dense, psi, range(6), lr=0.3, decay=decay)
    _dense(wrong, psi, range(6), lr=0.3, decay=decay, sign=1.0)
    for (name, ours), theirs, control in zip(model.named_parameters(), dense.parameters(), wrong.parameters()):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), name
        assert name not in psi or not torch.allclose(ours, control, rtol=1e-3)


def test_it_resumes_bit_for_bit():
    model = _model()
    optimizer = Toy(model, lr=0.3, rank=4)
    _train(optimizer, model, range(3))
    saved, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    _train(optimizer, model, range(3, 6))
    other = _model()
    other.load_state_dict(weights)
    resumed = Toy(other, lr=0.3, rank=4, seed=5)  # another seed: its own Psi would be another
    resumed.load_state_dict(saved)
    _train(resumed, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_a_matrix_without_a_gradient_stays_and_another_rank_is_refused():
    model = _model()
    optimizer = Toy(model, lr=0.3, rank=4, weight_decay=0.1)
    _train(optimizer, model, range(2))
    before = model[0].weight.clone()
    optimizer.zero_grad()
    model[1:](torch.randn(5, 9, dtype=torch.float64)).square().sin().mean().backward()
    optimizer.step()
    assert torch.equal(before, model[0].weight)
    with pytest.raises(ValueError, match="is none of rank 3"):
        Toy(_model(), lr=0.3, rank=3).load_state_dict(optimizer.state_dict())


def test_it_has_a_name_like_the_others():
    assert entry_of("toy").optimizer is Toy


def test_a_rule_that_may_fail_keeps_nothing_in_place(monkeypatch):
    monkeypatch.setattr(ToyRule, "can_fail", True)
    Toy(_model(), rank=4).detach()  # its field has a slot
    monkeypatch.setattr(ToyRule, "fields", staticmethod(lambda m, n, r: (Field("Psi", (m, r)),)))
    with pytest.raises(TypeError, match="give every field a slot, or set can_fail to False"):
        Toy(_model(), rank=4)
