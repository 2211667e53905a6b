"""The product of which a sketch is made, and the sum by rows that an embedding's is made of."""

import torch
from torch import Tensor

__all__ = ["add_product", "add_to_rows"]


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """out += alpha a @ b, summed in out's precision where the device's GEMM can."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=alpha)
    elif out.is_cuda:
        torch.addmm(out, a, b, alpha=alpha, out_dtype=out.dtype, out=out)
    else:
        out.add_(a @ b, alpha=alpha)


def add_to_rows(out: Tensor, ids: Tensor, rows: Tensor) -> None:
    """out[ids[t]] += rows[t] for every t, each time to the same bits.

    Args:
        out: (m, r).
        ids: (T,), integers below m; any may come several times.
        rows: (T, r).
    """
    rows = rows.to(out.dtype)
    if out.is_cuda:  # index_add_ adds in whatever order its threads come; this one sorts the ids and adds in theirs
        out.index_put_((ids.long(),), rows, accumulate=True)
    else:
        out.index_add_(0, ids, rows)
