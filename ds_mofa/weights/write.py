"""Writing W <- (1 - lr wd) W - lr U diag(c) V^T into whatever part of W this rank holds.

In 16 bits an update is rounded stochastically, or a master in fp32 takes it (:mod:`ds_mofa.kernels.random_bits`).
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_mofa.kernels import triton_serves
from ds_mofa.kernels.random_bits import Rounding, random_bits, round_stochastically
from ds_mofa.kernels.shard import Shard
from ds_mofa.weights import int8

__all__ = ["each_of", "write_updates"]

_CHUNK = 1 << 22  # elements of W per pass; bounds the fp32 temporaries to some tens of MB


@torch.no_grad()
def write_updates(
    shards: Sequence[Shard],
    U: Tensor,
    V: Tensor,
    coefficients: Tensor,
    *,
    numbers: Tensor,
    step_size: float,
    decay: float,
    rounding: Rounding,
    masters: Sequence[Tensor] | None = None,
) -> None:
    """W <- decay W - step_size U diag(coefficients) V^T for B matrices of one shape, in fp32 (fp64 for fp64).

    A matrix whose coefficients are all zero has had no gradient and stays as it is, bit for bit, its master too: it is
    not decayed and not rounded.

    Args:
        shards: the parts of each W to change, B matrices in all; all of the same range and dtype, or all of whole
            rows in eight bits, which have no masters.
        U: (B, m, r).
        V: (B, n, r).
        coefficients: (B, r), of each direction; all zero where nothing is to be done.
        numbers: (B,), int64, on the CPU: of the matrices in the model; they key the random bits.
        step_size: lr times the factor by shape.
        decay: 1 - lr * weight_decay.
        rounding: of 16-bit weights; with masters, always to nearest.
        masters: fp32 copies of the shards' elements, updated instead of the weights, which follow them.
    """
    in_eight_bits = shards[0].exponents is not None
    if masters is not None:
        rounding = dataclasses.replace(rounding, stochastic=False)
    if triton_serves(shards[0].flat) and in_eight_bits:
        from ds_mofa.kernels import _int8

        _int8.launch(shards, U, V, coefficients, numbers, step_size, decay, rounding)
        return
    if triton_serves(shards[0].flat):
        from ds_mofa.kernels import _write

        _write.launch(shards, U, V, coefficients, numbers, step_size, decay, rounding, masters)
        return
    moving = coefficients.any(-1).tolist()  # a NaN is not zero
    keys = rounding.weight_key(numbers).tolist() if rounding.stochastic else None
    wholes = [one for shard in shards for one in shard.each()]
    copies = None if masters is None else each_of(masters, shards)
    for i, shard in enumerate(wholes):
        if not moving[i]:
            continue
        key, master = None if keys is None else keys[i], None if copies is None else copies[i]
        arguments = shard, U[i], V[i], coefficients[i], step_size, decay, key, rounding.turn
        if in_eight_bits:
            int8.write_one(*arguments)
        else:
            _write_one(*arguments, master)


def each_of(masters: Sequence[Tensor], shards: Sequence[Shard]) -> list[Tensor]:
    """What :meth:`ds_mofa.kernels.shard.Shard.each` is of shards, of their masters."""
    return [one for master, shard in zip(masters, shards) for one in master.split(shard.length or 1)]


def _write_one(
    shard: Shard,
    U: Tensor,
    V: Tensor,
    coefficients: Tensor,
    step_size: float,
    decay: float,
    key: int | None,
    turn: int,
    master: Tensor | None,
) -> None:
    n = V.shape[0]
    exact = torch.promote_types(shard.flat.dtype, torch.float32)
    device = shard.flat.device  # the host's, where ZeRO offloads the weights
    # In the working copies' own precision, which the GPU's matrix units take.
    left = (U.to(device, exact) * coefficients.to(device, exact)).to(U.dtype).to(exact)
    right = V.to(device, exact).mT
    source = shard.flat if master is None else master
    stop = shard.start + shard.flat.numel()
    rows_per_chunk = max(1, _CHUNK // n)
    for row in range(shard.start // n, -(-stop // n), rows_per_chunk):
        last_row = min(row + rows_per_chunk, -(-stop // n))
        low, high = max(row * n, shard.start), min(last_row * n, stop)
        inside = slice(low - row * n, high - row * n)  # of the chunk's rows
        held = slice(low - shard.start, high - shard.start)  # of the shard
        delta = (left[row:last_row] @ right).view(-1)[inside]
        new = torch.sub(source[held].to(exact) * decay, delta, alpha=step_size)
        if master is not None:
            master[held] = new
        if key is not None and shard.flat.dtype in (torch.bfloat16, torch.float16):
            bits = random_bits(low, high - low, key, device, turn)
            new = round_stochastically(new, bits, shard.flat.dtype)
        shard.flat[held] = new.to(shard.flat.dtype)
