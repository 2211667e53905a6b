"""Products in e4m3 on a GPU: the kernels against their twins, the device's product against the exact one, and a run."""

import pytest
import torch

from ds_mofa import MoFaSGD
from ds_mofa.kernels import fp8
from tests.autoencoding import losses_by_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and fp8.refusal(torch.device("cuda"), torch.bfloat16) is not None,
        reason="needs a GPU that multiplies floats of eight bits",
    ),
]


def normal(*shape, seed=0, spread=20):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randint(-spread, spread + 1, (*shape[:-1], 1), generator=generator).float()
    return (torch.randn(*shape, generator=generator) * torch.exp2(scales)).bfloat16()


@pytest.mark.parametrize("with_channels", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (33, 1040), (70, 4096), (5, 14336), (3, 28672)], ids=str)
def test_rows_have_the_bits_of_their_twin(shape, with_channels):
    values = normal(*shape)
    values[0] = 0
    channels = torch.exp2(torch.randint(-14, 3, shape[-1:]).float()) if with_channels else None
    codes, scales = fp8.rows(values, channels)
    found, found_scales = fp8.rows(values.cuda(), None if channels is None else channels.cuda())
    assert torch.equal(found.cpu().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found_scales.cpu(), scales)


def test_what_is_no_number_stays_none():
    values = normal(3, 64)
    values[1, 4], values[2, 7] = float("inf"), float("nan")
    assert fp8.rows(values.cuda())[1].isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("shape", [(16, 16), (160, 80), (4096, 1024)], ids=str)
def test_columns_have_the_bits_of_their_twin(shape):
    weight = normal(*shape)
    scales = fp8.rows(weight)[1]
    found = fp8.columns(weight.cuda(), scales.cuda())
    assert torch.equal(found.cpu().view(torch.uint8), fp8.columns(weight, scales).view(torch.uint8))


@pytest.mark.parametrize(("t", "m", "n"), [(1, 16, 16), (37, 160, 208), (1024, 1536, 4096)])
def test_the_products_are_those_of_a_cpu(t, m, n):
    x, weight, dy = normal(t, n, spread=2), normal(m, n, seed=1, spread=2), normal(t, m, seed=2, spread=2)
    y, scales = fp8.product(x, weight)
    dx = fp8.input_gradient(dy, weight, scales)
    found, found_scales = fp8.product(x.cuda(), weight.cuda())
    for one, other in ((found, y), (fp8.input_gradient(dy.cuda(), weight.cuda(), found_scales), dx)):
        assert (one.cpu().double() - other.double()).norm() <= 0.004 * other.double().norm()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_run_is_that_of_the_cpu(compiled):
    losses = losses_by_device(lambda model: MoFaSGD(model, lr=5e-4, rank=8, explore=8, fp8=True), compiled=compiled)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)
    assert losses["cuda"][-1] < 0.9 * losses["cuda"][0]
