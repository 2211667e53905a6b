"""Weights of eight bits: codes of int8, and one power of two for every 32 neighbours in a row (MXINT8 of the Open Compute
Project's microscaling formats, 8.25 bits a weight).

    w = code * 2^(exponent - 127)        -127 <= code <= 127

The exponent is the least that makes room for the largest of the 32. A code has seven bits beside its sign and bf16 has eight,
so each of these weights is a bf16 number: a checkpoint in bf16 holds exactly what was trained, and since an update starts from
the values and finds the exponents anew, a run that is resumed from one goes on bit for bit.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from ds_mofa.kernels import launches_on

__all__ = ["CHUNK", "GROUP", "WIDE_DTYPES", "Int8Weight", "exponents_of", "nearest", "quantized", "whole", "widened"]

GROUP = 32
CHUNK = 1 << 22  # weights that are rounded in one pass; bounds the fp32 temporaries to some tens of MB
WIDE_DTYPES = (torch.bfloat16, torch.float32, torch.float64)  # fp16 has too small a range for the product
_NO_NUMBER = 255  # exponent of a group that holds a NaN or an infinity: none of its weights is a number

aten = torch.ops.aten


def widened(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights, (..., n), exactly.

    Args:
        codes: int8 (..., n), contiguous.
        exponents: uint8 (..., n / 32).
        dtype: one of :data:`WIDE_DTYPES`.
    """
    if launches_on(codes) and dtype != torch.float64:
        from ds_mofa.kernels import _int8

        return _int8.widen(codes, exponents, dtype)
    scales = (exponents.int() << 23).view(torch.float32).to(dtype)
    return (codes.unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)).flatten(-2)


def quantized(values: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and exponents of fp32 weights (..., n), n a multiple of 32.

    Args:
        bits: int64 of the same shape, uniform in [0, 2^16): each weight goes to one of its two neighbours, up with the
            probability of its distance. None: to the nearest, half to even.
    """
    groups = values.float().unflatten(-1, (-1, GROUP))
    exponents = exponents_of(groups.abs().amax(-1))
    inverse = ((254 - exponents).clamp_min(0) << 23).view(torch.float32)
    steps = groups * inverse.unsqueeze(-1)  # by a power of two: exact
    if bits is None:
        codes = steps.round()
    else:
        below = steps.floor()
        codes = below + (bits.view_as(steps) < (steps - below) * 65536)
    codes = torch.where((exponents == _NO_NUMBER).unsqueeze(-1), 0, codes)
    return codes.to(torch.int8).flatten(-2), exponents.to(torch.uint8)


def nearest(values: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Codes and exponents of the nearest to weights (..., n), on ``device``, theirs by default, in little more memory than they
    take.
    """
    device = values.device if device is None else device
    *leading, n = values.shape
    rows = values.reshape(-1, n)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=device)
    exponents = torch.empty((len(rows), n // GROUP), dtype=torch.uint8, device=device)
    step = max(1, CHUNK // n)
    for first in range(0, len(rows), step):
        own = slice(first, first + step)
        codes[own], exponents[own] = quantized(rows[own].to(device))
    return codes.view(*leading, n), exponents.view(*leading, n // GROUP)


def exponents_of(largest: Tensor) -> Tensor:
    """The exponents of groups by their largest magnitudes, fp32 -> int32: least k with largest <= 127 * 2^(k - 127)."""
    # 127 = 1.984375 * 2^6: a fraction above that carries into the exponent.
    found = ((largest.contiguous().view(torch.int32) + 0x1FFFF) >> 23) - 6
    return torch.where(largest.isfinite(), found.clamp_min(1), _NO_NUMBER)


def whole(weight: Tensor) -> Tensor:
    """A weight as its product needs it: what lies in eight bits is widened for it, anything else is what it is."""
    return weight.widened() if type(weight) is Int8Weight else weight


class Int8Weight(torch.Tensor):
    """A weight (..., n) that lies in eight bits, and reads as a tensor of ``dtype``.

    An operation that reads it gets it widened, for as long as it takes; ``torch.embedding`` widens the rows that it reads.
    ``copy_`` rounds to the nearest. Any other write is refused, since a change below the spacing would be lost in silence.
    Some rows are a view, in eight bits too; of another view outside of autograd the writes would be lost, and it is refused.

    ``fully_shard`` cuts it by rows, evenly, and sends eight bits.

    Args:
        codes: int8 (..., n), contiguous.
        exponents: uint8 (..., n / 32).
        dtype: one of :data:`WIDE_DTYPES`.
    """

    codes: Tensor
    exponents: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, exponents: Tensor, dtype: torch.dtype):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, exponents: Tensor, dtype: torch.dtype):
        self.codes, self.exponents = codes, exponents

    @classmethod
    def of(cls, values: Tensor) -> "Int8Weight":
        """The nearest to a weight of one of :data:`WIDE_DTYPES`, whose last dimension is a multiple of 32."""
        return cls(*nearest(values), values.dtype)

    def widened(self) -> Tensor:
        """An ordinary tensor of the same values."""
        return widened(self.codes, self.exponents, self.dtype)

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """What FSDP2 sends of its rows."""
        return (self.codes, self.exponents), None

    def fsdp_post_all_gather(self, gathered, metadata, param_dtype, *, out=None):
        """The whole of it, over what has been received, which FSDP2 frees and fills again."""
        if out is not None:
            return None
        if len(gathered) == 1:  # a single process sends the first part alone, to itself
            gathered = (*gathered, self.exponents)
        return Int8Weight(*gathered, param_dtype), ()

    def data_ptr(self) -> int:
        """Of the codes: by it others tell which weights are one (DeepSpeed, when it saves)."""
        return self.codes.data_ptr()

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        memo[id(self)] = new = Int8Weight(self.codes.clone(), self.exponents.clone(), self.dtype)
        new.requires_grad_(self.requires_grad)
        others = {name: value for name, value in vars(self).items() if name not in ("codes", "exponents")}
        vars(new).update(copy.deepcopy(others, memo))  # that it is a parameter is among these
        return new  # without a gradient, as a copy of any parameter is

    def __repr__(self, *, tensor_contents=None):
        return f"Int8Weight({self.widened()})"

    def __tensor_flatten__(self):
        return ["codes", "exponents"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, parts, dtype, *_):
        return cls(parts["codes"], parts["exponents"], dtype)

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        answer = _ANSWERS.get(func.overloadpacket, _read)
        return answer(func, *args, **(kwargs or {}))


torch.serialization.add_safe_globals([Int8Weight])

# ---------------------------------------------------------------------- what it answers


def _read(func, *args, **kwargs):
    """Any operation of the wide weights that writes none of them."""
    for place, argument in enumerate(func._schema.arguments):
        alias = argument.alias_info
        if alias is None:
            continue
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        values = [value for value in tree_leaves(given) if isinstance(value, Int8Weight)]
        if not values:
            continue
        if alias.is_write:
            raise NotImplementedError(
                f"{func.overloadpacket.__name__} writes into a weight of eight bits, where a small change would be lost: "
                "compute on weight.widened(), and put the result back with weight.copy_(), which rounds to the nearest"
            )
        recorded = torch.is_grad_enabled() and all(value.requires_grad for value in values)
        if func not in _LINEARS_VIEWS and not recorded:
            raise NotImplementedError(
                f"{func.overloadpacket.__name__} is a view of a weight of eight bits, and a write through it would be lost: "
                "read weight.widened(), and write with weight.copy_(), which rounds to the nearest"
            )
    return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))


_LINEARS_VIEWS = {aten.t.default, aten.transpose.int, aten.permute.default}  # of F.linear and @


def _whole(value: Any) -> Any:
    return value.widened() if isinstance(value, Int8Weight) else value


def _each(function: Callable[[Tensor], Tensor]):
    """What is of the codes as it is of the exponents."""

    def answer(func, weight, *args, **kwargs):
        new = Int8Weight(function(weight.codes), function(weight.exponents), weight.dtype)
        return return_and_correct_aliasing(func, (weight, *args), kwargs, new)

    return answer


def _rows(func, weight, *args, **kwargs):
    """A view, or several, of whole groups."""
    codes, exponents = func(weight.codes, *args, **kwargs), func(weight.exponents, *args, **kwargs)
    if isinstance(codes, Tensor):
        return Int8Weight(codes, exponents, weight.dtype)
    return [Int8Weight(*parts, weight.dtype) for parts in zip(codes, exponents)]


def _leading(func, weight, dim=0, *args, **kwargs):
    """Of a view along a dimension: all but the last have whole groups."""
    whole_groups = dim % weight.dim() < weight.dim() - 1
    return (_rows if whole_groups else _read)(func, weight, dim, *args, **kwargs)


def _split(func, weight, size, dim=0):
    return _rows(func, weight, size, dim) if dim % weight.dim() < weight.dim() - 1 else _read(func, weight, size, dim)


def _reshaped(func, weight, size, *rest):
    """A view whose rows are whole groups as well; that of fully_shard is flat."""
    size = list(size)
    if -1 in size:
        known = math.prod(one for one in size if one != -1)
        size[size.index(-1)] = weight.numel() // known
    itself = (
        func is aten.as_strided.default and tuple(size) == tuple(weight.shape) and tuple(rest[0]) == weight.stride()
    )
    if not size or size[-1] % GROUP or not (itself or func is aten.view.default):
        return _read(func, weight, size, *rest)
    return Int8Weight(weight.codes.view(size), weight.exponents.view(*size[:-1], size[-1] // GROUP), weight.dtype)


def _zeros(func, weight, size, **kwargs):
    """Eight bits where there is room for whole groups, ordinary ones else."""
    wanted = kwargs.get("dtype") or weight.dtype
    if not size or size[-1] % GROUP or wanted != weight.dtype:
        return _read(func, weight, size, **kwargs)
    groups, device = (*size[:-1], size[-1] // GROUP), kwargs.get("device")
    codes, exponents = weight.codes.new_zeros(size, device=device), weight.exponents.new_ones(groups, device=device)
    return Int8Weight(codes, exponents, weight.dtype)


def _converted(func, weight, *, dtype=None, device=None, non_blocking=False, **rest):
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in WIDE_DTYPES:
        raise NotImplementedError(
            f"a weight of eight bits reads as bfloat16, float32 or float64, not as {dtype}: take weight.widened() first"
        )
    how = {"device": device, "non_blocking": non_blocking, "copy": True}
    return Int8Weight(weight.codes.to(**how), weight.exponents.to(**how), dtype)


def _copy(func, target, source, non_blocking=False):
    if not isinstance(target, Int8Weight):
        return target.copy_(source.widened(), non_blocking)
    if not isinstance(source, Int8Weight):
        source = Int8Weight(*nearest(source.expand(target.shape), target.device), target.dtype)
    target.codes.copy_(source.codes, non_blocking)
    target.exponents.copy_(source.exponents, non_blocking)
    return target


def _embedding(func, weight, ids, *args, **kwargs):
    rows = ids.reshape(-1)
    found = widened(weight.codes[rows], weight.exponents[rows], weight.dtype)
    return found.view(*ids.shape, weight.shape[-1])


def _broadcast(func, tensors, *args):
    """Of c10d: both parts, one after the other."""
    for tensor in tensors:
        parts = (tensor.codes, tensor.exponents) if isinstance(tensor, Int8Weight) else (tensor,)
        *first, last = parts
        for part in first:
            func([part], *args)[1].wait()
        _, work = func([last], *args)
    return tensors, work


_ANSWERS: dict[Any, Callable[..., Any]] = {
    aten.detach: _each(lambda part: part),
    aten.alias: _each(lambda part: part),
    aten.clone: _each(torch.clone),
    aten._to_copy: _converted,
    aten.copy_: _copy,
    aten.slice: _leading,
    aten.select: _leading,
    aten.split: _split,
    aten.view: _reshaped,
    aten.as_strided: _reshaped,
    aten.new_zeros: _zeros,
    aten._pin_memory: _each(lambda part: part.pin_memory()),
    aten.is_pinned: lambda func, weight, *args, **kwargs: func(weight.codes, *args, **kwargs),
    aten.embedding: _embedding,
}
if torch.distributed.is_available():
    _ANSWERS[torch.ops.c10d.broadcast_] = _broadcast
