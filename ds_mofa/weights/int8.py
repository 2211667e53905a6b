"""Matrices that are kept in eight bits (:mod:`ds_mofa.kernels.int8`): a model's are put there, taken back, and written."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_mofa.kernels.int8 import GROUP, WIDE_DTYPES, Int8Weight, quantized, widened
from ds_mofa.kernels.random_bits import random_bits
from ds_mofa.kernels.shard import Shard
from ds_mofa.parameters import local_part

__all__ = ["put_in", "serves", "swap", "take_out", "write_one"]

_CHUNK = 1 << 22  # weights per pass; bounds the fp32 temporaries to some tens of MB


def serves(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a weight of this shape and dtype can be kept in eight bits: its rows are whole groups."""
    return dtype in WIDE_DTYPES and shape[-1] % GROUP == 0


@torch.no_grad()
def put_in(model: nn.Module, params: Iterable[nn.Parameter]) -> None:
    """Keep these parameters of the model in eight bits from now on, each the same object as before.

    They are rounded to the nearest one after the other, so at most one is there twice. ``model.state_dict()`` has ordinary
    tensors of their dtype in host memory, and ``load_state_dict`` takes such.

    Raises:
        RuntimeError: something else refers to a parameter's memory, a view or a graph; or a hook stands on it.
    """
    changed = False
    for param in params:
        if not isinstance(param, Int8Weight):
            swap(param, Int8Weight.of(param.detach()))
            changed = True
    if changed and not any(isinstance(hook, _Plain) for hook in model._state_dict_hooks.values()):
        model.register_state_dict_post_hook(_Plain())


@torch.no_grad()
def take_out(model: nn.Module) -> None:
    """Every parameter that is kept in eight bits is an ordinary one again, of the same values."""
    for param in model.parameters():
        if isinstance(param, Int8Weight):
            swap(param, param.widened())
    for key in [key for key, hook in model._state_dict_hooks.items() if isinstance(hook, _Plain)]:
        del model._state_dict_hooks[key]


def swap(param: nn.Parameter, tensor: Tensor) -> None:
    """Let the parameter, which stays the object that it is, be this tensor.

    :func:`torch.utils.swap_tensors` refuses objects that have a weak reference. DeepSpeed has one to each parameter, by
    which it finds its name, and that stays right.
    """
    param.grad = None
    hooks = param._backward_hooks, getattr(param, "_post_accumulate_grad_hooks", None)
    held: Any = param  # torch's stub has not all of it
    if any(hooks) or held._use_count() > 1:
        raise RuntimeError(
            f"a weight {tuple(param.shape)} cannot be put into other memory: a hook stands on it, or a graph of an earlier "
            "forward or a view refers to it. Build the optimizer before the first forward, and put hooks on weights after that"
        )
    new = nn.Parameter(tensor, requires_grad=param.requires_grad)
    marks = {name: value for name, value in vars(param).items() if name not in ("codes", "exponents")}
    vars(new).update(marks)
    param.__class__, new.__class__ = new.__class__, param.__class__
    param.__dict__, new.__dict__ = new.__dict__, param.__dict__
    torch._C._swap_tensor_impl(param, new)


class _Plain:
    """A hook of ``state_dict``: in the place of weights of eight bits ordinary ones, on the host, for a card that holds eight
    bits a weight need not have room for sixteen; of a sharded weight this process's part, where it is. What is tied stays tied.
    """

    _from_public_api = True

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        done: dict[int, Tensor] = {}
        for name, value in state.items():
            local = local_part(value) if isinstance(value, Tensor) else value
            if not isinstance(local, Int8Weight):
                continue
            key = local.data_ptr()
            if key not in done:
                done[key] = local.widened().to("cpu") if local is value else _like(value, local.widened())
            state[name] = done[key]


def _like(sharded: Any, local: Tensor) -> Tensor:
    """A DTensor of another local part, which lies as ``sharded`` does."""
    where = {"run_check": False, "shape": sharded.shape, "stride": sharded.stride()}
    return type(sharded).from_local(local, sharded.device_mesh, sharded.placements, **where)


def write_one(
    shard: Shard, U: Tensor, V: Tensor, coefficients: Tensor, step_size: float, decay: float, key: int | None, turn: int
) -> None:
    """W <- decay W - step_size U diag(coefficients) V^T of whole rows of one matrix in eight bits, in fp32, rounded once.

    Args:
        U: (m, r).
        V: (n, r).
        coefficients: (r,).
        key, turn: of the random bits (:class:`ds_mofa.kernels.random_bits.Rounding`); without a key, to the nearest.
    """
    n = V.shape[0]
    assert shard.exponents is not None  # else the weights are not of eight bits
    codes, exponents = shard.flat.view(-1, n), shard.exponents.view(-1, n // GROUP)
    # In the working copies' own precision, which the GPU's matrix units take.
    left = (U.float() * coefficients.float()).to(U.dtype).float()
    right, first = V.float().mT, shard.start // n
    rows_per_chunk = max(1, _CHUNK // n)
    for row in range(0, len(codes), rows_per_chunk):
        own = slice(row, min(row + rows_per_chunk, len(codes)))
        old = widened(codes[own], exponents[own], torch.float32)
        delta = left[first + own.start : first + own.stop] @ right
        new = torch.sub(old * decay, delta, alpha=step_size)
        bits = None
        if key is not None:
            bits = random_bits((first + own.start) * n, new.numel(), key, new.device, turn).view_as(new)
        codes[own], exponents[own] = quantized(new, bits)
