"""Which work the Triton kernels are launched for: tensors that are there, weights too, and nothing that is traced."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_mofa import kernels
from ds_mofa.kernels.int8 import Int8Weight


@pytest.fixture(autouse=True)
def everything_is_on_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "triton_serves", lambda tensor: True)


def test_a_weight_is_a_tensor_that_is_there():
    weight = torch.randn(4, 32)
    assert kernels.launches_on(weight)
    assert kernels.launches_on(nn.Parameter(weight))
    assert kernels.launches_on(weight.requires_grad_())


def test_what_has_no_memory_of_its_own_is_not():
    with FakeTensorMode():
        fake = torch.empty(4, 32)
        assert not kernels.launches_on(fake)
        assert not kernels.launches_on(nn.Parameter(fake))
    assert not kernels.launches_on(Int8Weight.of(torch.randn(4, 32)))


def test_what_is_compiled_is_not(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not kernels.launches_on(torch.randn(4, 32))
