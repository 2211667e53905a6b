"""Products of linears in floats of eight bits (e4m3): forward and dX, which are all that a captured linear multiplies.

Every row, of a token or of an output channel, is divided by a power of two that lets its largest magnitude fit, so scaling is
exact, and rounds each number to 3 bits behind its leading one. Sums are fp32.

    Y = (X / a)_8 (W / s)_8^T . a s^T          dX = ((dY s) / c)_8 (W / s)_8 . c

Both products take the same rounded weights. The scales s of the output channels are among the summed in dX, where the product
takes none, and so go into dY before it is rounded.
"""

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from ds_mofa.kernels import launches_on

__all__ = ["FP8", "columns", "input_gradient", "product", "refusal", "rows", "serves"]

FP8 = torch.float8_e4m3fn  # the largest is 448, 1.75 * 2^8
_CAPABILITY = (8, 9)
_MULTIPLE = 16  # that the device's product wants of both sides of a weight
_LEAST_EXPONENT = -100  # of rows of zeros


def serves(m: int, n: int) -> bool:
    """Whether a weight of this shape can be multiplied in eight bits."""
    return m % _MULTIPLE == 0 and n % _MULTIPLE == 0


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights of this dtype cannot be multiplied in eight bits there; None where they can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} multiplies no floats of eight bits, which takes compute capability 8.9"
    if dtype not in (torch.bfloat16, torch.float32):  # the latter under autocast
        return f"the products are bf16, and the weights {dtype}"
    return None


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T, and the scales of W's rows, (m,) fp32, which :func:`input_gradient` takes.

    Args:
        x: (..., n), bf16.
        weight: (m, n), bf16.

    Raises:
        RuntimeError: another dtype.
    """
    if x.dtype != torch.bfloat16:
        raise RuntimeError(
            f"fp8 multiplies bf16, and a linear got {x.dtype}: load the model in bf16, train under autocast in bf16, or leave "
            "fp8 out"
        )
    flat = x.reshape(-1, x.shape[-1])
    x8, a = rows(flat)
    w8, s = rows(weight)
    return _scaled(x8, w8, a, s).view(*x.shape[:-1], len(weight)), s


def input_gradient(dy: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """dY W.

    Args:
        dy: (..., m), bf16.
        weight: (m, n), bf16, as it was in :func:`product`.
        scales: of its rows, from there.
    """
    flat = dy.reshape(-1, dy.shape[-1])
    dy8, c = rows(flat, scales)
    w8 = columns(weight, scales)
    return _scaled(dy8, w8, c, torch.ones_like(w8[:, 0], dtype=torch.float32)).view(*dy.shape[:-1], weight.shape[1])


def rows(values: Tensor, channels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values over the scales of their rows in e4m3, and these scales, powers of two.

    Args:
        values: (t, k), bf16.
        channels: (k,), fp32 powers of two, by which the columns are multiplied first.

    Returns:
        (t, k) and (t,) fp32. A row with a NaN or an infinity becomes NaN.
    """
    if launches_on(values):
        from ds_mofa.kernels import _fp8

        return _fp8.rows(values.contiguous(), channels)
    wide = values.float() if channels is None else values.float() * channels
    largest = wide.abs().amax(-1)
    exponents = _exponents(largest)
    scales = torch.where(largest.isfinite(), _power(exponents), torch.nan)  # which makes a NaN of the whole row
    return (wide * _power(-exponents).unsqueeze(-1)).to(FP8), scales


def columns(weight: Tensor, scales: Tensor) -> Tensor:
    """(W / s)^T in e4m3, (n, m) contiguous, of W (m, n) bf16 and s (m,)."""
    if launches_on(weight):
        from ds_mofa.kernels import _fp8

        return _fp8.columns(weight.contiguous(), scales)
    return (weight.float() / scales.unsqueeze(-1)).to(FP8).mT.contiguous()


def _exponents(largest: Tensor) -> Tensor:
    """Least k, int32, with largest <= 448 * 2^k."""
    # 448 is 1.75 * 2^8: a fraction above 0.75 carries into the exponent.
    found = ((largest.contiguous().view(torch.int32) + 0x1FFFFF) >> 23) - 127 - 8
    return found.clamp_min(_LEAST_EXPONENT)


def _power(exponents: Tensor) -> Tensor:
    """2^k, fp32; k in [-126, 127]."""
    return ((exponents + 127) << 23).view(torch.float32)


def _scaled(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor) -> Tensor:
    """a b^T times the scales of both's rows, bf16: (t, p) of (t, k) and (p, k)."""
    if not a.is_cuda:  # torch 2.11 multiplies these on GPUs alone
        return (a.float() @ b.float().mT * a_scales.unsqueeze(-1) * b_scales).bfloat16()
    by_row = ScalingType.RowWise
    scales = a_scales.unsqueeze(-1), by_row, b_scales.unsqueeze(0), by_row
    return scaled_mm(a, b.mT, *scales, output_dtype=torch.bfloat16, use_fast_accum=True)
