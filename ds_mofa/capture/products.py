"""The product of which a sketch is made, the sum by rows that an embedding's is made of, and those of a stack's matrices."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_mofa.kernels import triton_serves

__all__ = ["add_grouped", "add_product", "add_to_rows", "grouped_outer", "grouped_product"]


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """out += alpha a @ b of matrices, or of batches of them, summed in out's precision where the device's GEMM can."""
    add, add_ = (torch.addmm, out.addmm_) if out.dim() == 2 else (torch.baddbmm, out.baddbmm_)
    if a.dtype == out.dtype:
        add_(a, b, alpha=alpha)
    elif out.is_cuda:
        add(out, a, b, alpha=alpha, out_dtype=out.dtype, out=out)
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


def add_grouped(
    Y: Tensor,
    Z: Tensor,
    left: Tensor,
    right: Tensor,
    U: Tensor,
    V: Tensor,
    ends: Tensor,
    left_rows: Tensor | None = None,
    right_rows: Tensor | None = None,
) -> None:
    """Y[e] += left_e^T (right_e V[e]) and Z[e] += right_e^T (left_e U[e]) for every matrix e of a stack.

    On a GPU the 16-bit products of all matrices are two launches; otherwise they follow one another, and the host waits for
    ``ends``.

    Args:
        Y: (E, m, r).
        Z: (E, n, r).
        left: (S, m), of which rows [ends[e - 1], ends[e]) are e's.
        right: (S, n), likewise, of the same dtype.
        U: (E, m, r).
        V: (E, n, r).
        ends: (E,), int32. A matrix without rows keeps its sketches bit for bit.
        left_rows: (S,), int32: ``left`` is (T, m) in any order, and its row for each of S.
        right_rows: the same of ``right``.
    """
    torch.ops.ds_mofa.sketch_grouped(Y, Z, left, right, U, V, ends, left_rows, right_rows)


def grouped_product(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """The rows of x times each group's own matrix.

    Args:
        x: (S, k), of which rows [ends[e - 1], ends[e]) are of group e; there are no others.
        stack: (E, k, p), of x's dtype; or a transposed view of such a stack.
        ends: (E,), int32.

    Returns:
        (S, p).
    """
    return torch.ops.ds_mofa.grouped_product(x, stack, ends)


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left_e^T right_e of every group, (E, m, n), formed: what :func:`add_grouped` is there to spare. The host waits.

    Args:
        left: (S, m), of which rows [ends[e - 1], ends[e]) are of group e.
        right: (S, n), likewise.
        ends: (E,), int32.
    """
    out = left.new_zeros(len(ends), left.shape[-1], right.shape[-1])
    for e, rows in _groups(ends):
        torch.mm(left[rows].mT, right[rows], out=out[e])
    return out


# Operators: what the rows of a group are is known only when they run, and neither a graph nor a simulation looks into them.
_library = torch.library.Library("ds_mofa", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("grouped_product(Tensor x, Tensor stack, Tensor ends) -> Tensor", tags=_tags)
_library.define(
    "sketch_grouped(Tensor(a!) Y, Tensor(b!) Z, Tensor left, Tensor right, Tensor U, Tensor V, Tensor ends,"
    " Tensor? left_rows, Tensor? right_rows) -> ()",
    tags=_tags,
)


def _sketch_grouped(
    Y: Tensor,
    Z: Tensor,
    left: Tensor,
    right: Tensor,
    U: Tensor,
    V: Tensor,
    ends: Tensor,
    left_rows: Tensor | None,
    right_rows: Tensor | None,
) -> None:
    operands = left, right, U, V
    if triton_serves(left) and Y.dtype == torch.float32 and {t.dtype for t in operands} in _KERNEL_DTYPES:
        from ds_mofa.kernels import _experts

        of = {"left_rows": left_rows, "right_rows": right_rows}
        _experts.launch(left.contiguous(), right.contiguous(), ends, U, V, Y, Z, **of)
        return
    left = left if left_rows is None else left[left_rows]
    right = right if right_rows is None else right[right_rows]
    for e, rows in _groups(ends):
        L, R = left[rows], right[rows]
        add_product(Y[e], L.mT, R @ V[e].to(R.dtype))
        add_product(Z[e], R.mT, L @ U[e].to(L.dtype))


def _grouped_product(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    if x.is_cuda and _grouped_mm is not None and _is_aligned(x) and _is_aligned(stack):
        return _grouped_mm(x, stack, offs=ends)
    out = x.new_empty(x.shape[0], stack.shape[-1])
    for e, rows in _groups(ends):
        torch.mm(x[rows], stack[e], out=out[rows])
    return out


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and these. The host waits to know."""
    first = 0
    for e, last in enumerate(ends.tolist()):
        if last > first:
            yield e, slice(first, last)
        first = last


_library.impl("grouped_product", _grouped_product, "CompositeExplicitAutograd")
_library.impl("sketch_grouped", _sketch_grouped, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ds_mofa::grouped_product", lambda x, stack, ends: x.new_empty(x.shape[0], stack.shape[-1]), lib=_library
)
torch.library.register_fake("ds_mofa::sketch_grouped", lambda *args: None, lib=_library)

_KERNEL_DTYPES = ({torch.bfloat16}, {torch.float16})
_grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)


def _is_aligned(matrix: Tensor) -> bool:
    """Whether torch's grouped product takes it: one of the last two strides is 1, and the other 16 bytes or a multiple."""
    if matrix.dtype not in (torch.bfloat16, torch.float16, torch.float32) or matrix.data_ptr() % 16:
        return False
    low, high = sorted(matrix.stride()[-2:])
    return low == 1 and high * matrix.element_size() % 16 == 0
