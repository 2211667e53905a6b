"""The one product of which a sketch is made."""

import torch
from torch import Tensor

__all__ = ["add_product"]


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """out += alpha a @ b, summed in out's precision where the device's GEMM can."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=alpha)
    elif out.is_cuda:
        torch.addmm(out, a, b, alpha=alpha, out_dtype=out.dtype, out=out)
    else:
        out.add_(a @ b, alpha=alpha)
