"""The cross-entropy that writes its gradient over the logits is the library's, whatever the blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_mofa.kernels import cross_entropy as module
from ds_mofa.kernels.cross_entropy import cross_entropy
from tests.live_bytes import LiveBytes


def problem(t=23, m=61, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(t, m, generator=generator, dtype=torch.float64) * 5
    return logits.to(dtype), torch.randint(m, (t,), generator=generator), torch.rand(t, generator=generator)


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradient_are_the_library_s(monkeypatch, dtype, rows):
    logits, targets, factors = problem(dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    monkeypatch.setattr(module, "BLOCK_BYTES", rows * logits.shape[-1] * wide.itemsize)
    exact = logits.double().clone().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (expected * factors.double()).sum().backward()
    losses = cross_entropy(logits, targets, factors.to(wide))
    assert losses.dtype == wide
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert (logits.double() - exact.grad).norm() <= tolerance * exact.grad.norm()


def test_without_factors_the_logits_stay():
    logits, targets, _ = problem(dtype=torch.bfloat16)
    before = logits.clone()
    losses = cross_entropy(logits, targets, None)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses, F.cross_entropy(before.float(), targets, reduction="none"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows(value):
    logits = torch.zeros(3, 300, dtype=torch.bfloat16)
    logits[1, 7] = value
    losses = cross_entropy(logits, torch.zeros(3, dtype=torch.int64), torch.ones(3))
    assert losses.isfinite().tolist() == [True, False, True]
    assert logits[1].isnan().any() and logits[0].isfinite().all()


def test_a_simulation_counts_the_losses_alone():
    logits, targets, factors = problem(t=40, m=1000, dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [mode.from_tensor(part) for part in (logits, targets, factors)]
        with LiveBytes() as live:
            losses = cross_entropy(*given)
    assert losses.shape == (40,) and losses.dtype == torch.float32
    assert live.peak <= 40 * 4
