"""Products in e4m3: which numbers they are rounded to, and that the scales come out again."""

import pytest
import torch

from ds_mofa.kernels import fp8


def normal(*shape, seed=0, spread=0):
    """bf16, with rows of magnitudes up to 2^``spread`` apart."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randint(-spread, spread + 1, (*shape[:-1], 1), generator=generator).float()
    return (torch.randn(*shape, generator=generator) * torch.exp2(scales)).bfloat16()


def rounded(values, channels=None):
    """What :func:`fp8.rows` makes of them, in float64."""
    codes, scales = fp8.rows(values, channels)
    return codes.double() * scales.double().unsqueeze(-1)


@pytest.mark.parametrize("spread", [0, 40])
def test_rows_are_rounded_to_three_bits_behind_the_leading_one(spread):
    values = normal(50, 96, spread=spread)
    codes, scales = fp8.rows(values)
    assert codes.dtype == fp8.FP8
    assert (torch.frexp(scales).mantissa == 0.5).all(), "a power of two"
    largest = codes.float().abs().amax(-1)
    assert largest.gt(208).all() and largest.le(448).all(), "half of the scale would do; or it does not"
    exact = values.double()
    # What is below 2^-6 of a scale is subnormal: nearest of 2^-9.
    allowed = torch.maximum(exact.abs() * 2.0**-4, scales.double().unsqueeze(-1) * 2.0**-10)
    assert ((rounded(values) - exact).abs() <= allowed).all()


@pytest.mark.parametrize(
    "largest, scale", [(448.0, 1.0), (450.0, 2.0), (224.0, 0.5), (1.75, 2.0**-8), (1.7578125, 2.0**-7)]
)
def test_the_scale_is_the_least_that_has_room(largest, scale):
    values = torch.zeros(1, 16, dtype=torch.bfloat16)
    values[0, 3] = -largest
    assert fp8.rows(values)[1].item() == scale


def test_zeros_stay_zeros_and_what_is_no_number_stays_none():
    values = torch.zeros(3, 32, dtype=torch.bfloat16)
    values[1, 4], values[2, 7] = float("inf"), float("nan")
    found = rounded(values)
    assert torch.equal(found[0], torch.zeros(32, dtype=torch.float64))
    assert found[1:].isnan().all()


@pytest.mark.parametrize("spread", [0, 20])
@pytest.mark.parametrize(("t", "m", "n"), [(1, 16, 16), (7, 48, 32), (40, 64, 208)])
def test_both_products_are_those_of_what_was_rounded(t, m, n, spread):
    x, weight, dy = (
        normal(t, n, spread=spread),
        normal(m, n, seed=1, spread=spread),
        normal(t, m, seed=2, spread=spread),
    )
    y, scales = fp8.product(x.view(1, t, n), weight)
    dx = fp8.input_gradient(dy, weight, scales)
    assert y.shape == (1, t, m) and y.dtype == dx.dtype == torch.bfloat16
    W = rounded(weight)
    gradient = rounded(dy, scales)  # over the scales of the weight's rows, which are in what W is of
    for found, exact, magnitude in (
        (y[0], rounded(x) @ W.mT, rounded(x).abs() @ W.abs().mT),
        (
            dx,
            gradient @ (W / scales.double().unsqueeze(-1)),
            gradient.abs() @ (W / scales.double().unsqueeze(-1)).abs(),
        ),
    ):
        assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6 * magnitude).all()


def test_they_are_near_the_exact_ones():
    x, weight, dy = normal(300, 256), normal(128, 256, seed=1), normal(300, 128, seed=2)
    y, scales = fp8.product(x, weight)
    dx = fp8.input_gradient(dy, weight, scales)
    for found, exact in ((y, x.double() @ weight.double().mT), (dx, dy.double() @ weight.double())):
        assert 0.02 < (found.double() - exact).norm() / exact.norm() < 0.045


def test_columns_are_the_rows_turned():
    weight = normal(48, 80, spread=10)
    codes, scales = fp8.rows(weight)
    turned = fp8.columns(weight, scales)
    assert turned.is_contiguous()
    assert torch.equal(turned.float(), codes.float().mT)


def test_another_dtype_is_refused():
    with pytest.raises(RuntimeError, match="got torch.float32: load the model in bf16"):
        fp8.product(torch.ones(2, 16), torch.ones(16, 16))


def test_sides_that_the_device_cannot_multiply():
    assert fp8.serves(16, 4096) and not fp8.serves(16, 40) and not fp8.serves(100, 16)
