"""The cross-entropy of rows of logits on a GPU: its twin's numbers, in no more memory than the losses."""

import pytest
import torch

from ds_mofa.kernels.cross_entropy import cross_entropy, in_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("t", "m"), [(1, 7), (23, 61), (5, 8193), (300, 128256)])
def test_it_is_its_twin(t, m, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (torch.randn(t, m, generator=generator, device="cuda") * 5).to(dtype)
    targets = torch.randint(m, (t,), generator=generator, device="cuda")
    factors = torch.rand(t, generator=generator, device="cuda")
    gradient = logits.clone()
    expected = in_blocks(gradient, targets, factors)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = cross_entropy(logits, targets, factors)
    assert torch.cuda.max_memory_allocated() - before <= 4 * t + 512
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    rounding = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    assert (logits.float() - gradient.float()).norm() <= rounding * gradient.float().norm()
    assert torch.equal(cross_entropy(gradient.clone(), targets, None), cross_entropy(gradient.clone(), targets, None))


def test_without_factors_the_logits_stay():
    logits = torch.randn(5, 300, device="cuda", dtype=torch.bfloat16)
    before = logits.clone()
    cross_entropy(logits, torch.zeros(5, dtype=torch.int64, device="cuda"), None)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows(value):
    logits = torch.zeros(3, 300, device="cuda", dtype=torch.bfloat16)
    logits[1, 7] = value
    losses = cross_entropy(logits, torch.zeros(3, dtype=torch.int64, device="cuda"), torch.ones(3, device="cuda"))
    assert losses.isfinite().tolist() == [True, False, True]
    assert logits[1].isnan().any() and logits[0].isfinite().all()


def test_logits_of_minus_infinity_have_no_share():
    logits = torch.zeros(2, 20000, device="cuda", dtype=torch.bfloat16)
    logits[:, 3:] = -float("inf")
    losses = cross_entropy(logits, torch.zeros(2, dtype=torch.int64, device="cuda"), torch.ones(2, device="cuda"))
    torch.testing.assert_close(losses, torch.full((2,), 3.0, device="cuda").log())
    assert not logits[:, 3:].any()
