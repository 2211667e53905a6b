"""W <- decay W - step_size U diag(c) V^T in one pass over W: tile by tile, rounded stochastically on the way out.

Bound by memory, if the next tile is fetched while this one is computed: 3.3 of an H200's 4.25 TB/s. The twin is
``ds_mofa.weights.write._write_one``; the random bits are those of ``ds_mofa.kernels.random_bits.random_bits``.

A matrix whose coefficients are all zero stays. The kernels find it out, for the host does not wait for them: then none
of its elements counts as held, so that nothing of W is read or written.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_mofa.kernels import on_its_device, stages_that_fit, tile_that_fits
from ds_mofa.kernels.random_bits import Rounding
from ds_mofa.kernels.shard import Shard

_TILES = 8  # that one program writes
_MOST = 65535  # matrices, the third axis of a grid
_PAIRS = {16: (64, 64, 4, 4), 32: (64, 64, 4, 4), 64: (64, 32, 4, 3), 128: (64, 64, 4, 3)}  # rows, words, warps, stages
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@on_its_device
def launch(
    shards: Sequence[Shard],
    U: Tensor,
    V: Tensor,
    coefficients: Tensor,
    numbers: Tensor,
    step_size: float,
    decay: float,
    rounding: Rounding,
    masters: Sequence[Tensor] | None,
) -> None:
    """The work of ``write_updates`` on a GPU, one launch for all matrices."""
    start, numel, dtype = shards[0].start, shards[0].length, shards[0].flat.dtype
    if numel == 0:
        return
    (B, m, r), n = U.shape, V.shape[1]
    check_count(B)
    device = U.device
    weights = addresses([shard.flat for shard in shards], numel, device)
    first_row, last_row = start // n, -(-(start + numel) // n)
    stochastic = rounding.stochastic and dtype != torch.float32
    keys = keys_of(rounding, numbers, device) if stochastic else weights
    R = max(16, triton.next_power_of_2(r))
    # Two bf16 weights are one word: half the hashing, and no shuffling between threads.
    in_pairs = dtype == torch.bfloat16 == U.dtype and stochastic and n % 2 == start % 2 == numel % 2 == 0
    if in_pairs and all(shard.flat.data_ptr() % 4 == 0 for shard in shards):
        # Words count from the beginning of the shard's first row, so that 32 bits reach every one of them.
        before = first_row * n // 2
        low, high = start // 2 - before, (start + numel) // 2 - before
        wide = (n // 2) % 4 == 0 and all((shard.flat.data_ptr() - 4 * low) % 16 == 0 for shard in shards)
        # Tiles of one strip of columns, one after the other: its part of V stays, the next tile of W is on its way.
        block_m, block_n, warps, most = _PAIRS[R] if R in _PAIRS else _PAIRS[max(_PAIRS)]
        block_m, block_n = tile_that_fits(device, (block_m, block_n), lambda rows, words: _pairs_bytes(rows, words, R))
        strip = 4 * R * block_n  # of V, beside the tiles of W and U
        stages = stages_that_fit(device, _pairs_bytes(block_m, block_n, R) - strip, other=strip, most=most)
        grid = (triton.cdiv(n // 2, block_n), triton.cdiv(last_row - first_row, block_m * _TILES), B)
        _write_pairs_kernel[grid](
            weights,
            keys,
            U,
            V,
            coefficients,
            m,
            n,
            r,
            first_row,
            before,
            low,
            high,
            step_size,
            decay,
            rounding.turn,
            R=R,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            TILES=_TILES,
            STAGES=stages,
            WIDE=wide,
            num_warps=warps,
        )
        return
    row = R * U.element_size()
    block_m, block_n = tile_that_fits(device, (32, 256), lambda rows, columns: (rows + columns) * row)  # of U and V
    grid = (triton.cdiv(n, block_n), triton.cdiv(last_row - first_row, block_m), B)
    _write_kernel[grid](
        weights,
        weights if masters is None else addresses(masters, numel, device),
        keys,
        U,
        V,
        coefficients,
        m,
        n,
        r,
        first_row,
        start,
        start + numel,
        step_size,
        decay,
        rounding.turn,
        R=R,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        DTYPE=_DTYPES[dtype],
        STOCHASTIC=stochastic,
        MASTER=masters is not None,
        num_warps=8,
    )


def _pairs_bytes(block_m: int, block_n: int, R: int) -> int:
    """Of shared memory, by the kernel of pairs: V's even and odd columns, and one stage of W and U."""
    return 4 * R * block_n + block_m * (4 * block_n + 2 * R)


def check_count(matrices: int) -> None:
    """Raise a ValueError where one launch has no room for so many."""
    if matrices > _MOST:
        raise ValueError(
            f"{matrices} matrices of one shape in one param group, and a launch has room for {_MOST}: divide them into several "
            "param groups"
        )


def addresses(parts: Sequence[Tensor], length: int, device: torch.device) -> Tensor:
    """Where each matrix's ``length`` elements begin, int64 (B,); of a stack's one after the other."""
    stride = length * parts[0].element_size()
    return _table(tuple((part.data_ptr(), part.numel() // length) for part in parts), stride, device)


def keys_of(rounding: Rounding, numbers: Tensor, device: torch.device) -> Tensor:
    """Of each matrix's bits, int64 (B,); they are the same in every step."""
    return _keys(rounding.seed, tuple(numbers.tolist()), device)


@functools.lru_cache(maxsize=1024)
def _keys(seed: int, numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return Rounding(True, seed).weight_key(torch.tensor(numbers, dtype=torch.int64)).to(device, non_blocking=True)


@functools.lru_cache(maxsize=1024)
def _table(places: tuple[tuple[int, int], ...], stride: int, device: torch.device) -> Tensor:
    """``count`` addresses from each on, on the device; they are the same in every step."""
    one_by_one = [address + stride * i for address, count in places for i in range(count)]
    return torch.tensor(one_by_one, dtype=torch.int64, device=device)


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["first_row", "turn"])
def _write_kernel(
    weights,
    masters,
    keys,
    U,
    V,
    coefficients,
    m,
    n,
    r,
    first_row,
    start,
    stop,
    step_size,
    decay,
    turn,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASTER: tl.constexpr,
):
    """Any dtype, any range; a master or not."""
    batch = tl.program_id(2).to(tl.int64)
    row = first_row + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, R)

    in_u = (row < m)[:, None] & (k < r)[None, :]
    in_v = (k < r)[:, None] & (col < n)[None, :]
    u = tl.load(U + batch * m * r + row[:, None] * r + k[None, :], mask=in_u, other=0.0)
    v = tl.load(V + batch * n * r + col[None, :] * r + k[:, None], mask=in_v, other=0.0)
    c = tl.load(coefficients + batch * r + k, mask=k < r, other=0.0)
    delta = _product((u.to(tl.float32) * c.to(tl.float32)[None, :]).to(u.dtype), v)

    at = row.to(tl.int64)[:, None] * n + col[None, :]
    held = tl.where(_any(c), col < n, False)[None, :] & (at >= start) & (at < stop)
    weight = tl.load(weights + batch).to(tl.pointer_type(DTYPE)) + (at - start)
    if MASTER:
        master = tl.load(masters + batch).to(tl.pointer_type(tl.float32)) + (at - start)
        old = tl.load(master, mask=held, other=0.0)
    else:
        old = tl.load(weight, mask=held, other=0.0).to(tl.float32)
    new = old * decay - step_size * delta
    if MASTER:
        tl.store(master, new, mask=held)

    if STOCHASTIC:
        word = _mix((at >> 1).to(tl.uint32) ^ tl.load(keys + batch).to(tl.uint32))
        bits = _turned(tl.where((at & 1) == 1, word >> 16, word), turn)
        raw = _word(new)
        if DTYPE == tl.bfloat16:
            new = ((raw + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            normal = ((raw + (bits >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
            smallest = 5.960464477539063e-08  # 2^-24, the spacing of fp16 below 2^-14
            steps = new / smallest
            below = tl.floor(steps)
            subnormal = (below + tl.where(bits.to(tl.float32) < (steps - below) * 65536.0, 1.0, 0.0)) * smallest
            new = tl.where(tl.abs(new) < 6.103515625e-05, subnormal, normal)
    tl.store(weight, new.to(DTYPE), mask=held)


@triton.jit(do_not_specialize=["first_row", "before", "turn"])
def _write_pairs_kernel(
    weights,
    keys,
    U,
    V,
    coefficients,
    m,
    n,
    r,
    first_row,
    before,
    low,
    high,
    step_size,
    decay,
    turn,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """bf16 with stochastic rounding, two neighbours in a row as one 32-bit word; the same bits as above.

    ``before`` words of the matrix come before those of ``first_row``; of the words from there on, the shard holds
    [low, high). WIDE: four words at a time.
    """
    batch = tl.program_id(2).to(tl.int64)
    pair = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    half = n // 2
    k = tl.arange(0, R)

    in_v = (k < r)[:, None] & (pair < half)[None, :]
    columns = V + batch * n * r + pair[None, :] * (2 * r) + k[:, None]
    v_even = tl.load(columns, mask=in_v, other=0.0)
    v_odd = tl.load(columns + r, mask=in_v, other=0.0)
    c = tl.load(coefficients + batch * r + k, mask=k < r, other=0.0).to(tl.float32)
    inside = tl.where(_any(c), pair < half, False)
    key = tl.load(keys + batch).to(tl.uint32)
    words = tl.load(weights + batch).to(tl.pointer_type(tl.uint32)) - low
    if WIDE:
        words = tl.multiple_of(words, 16)

    for tile in tl.range(0, TILES, num_stages=STAGES):
        from_first = (tl.program_id(1) * TILES + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        at = from_first[:, None] * half + pair[None, :]
        held = inside[None, :] & (at >= low) & (at < high)
        old = tl.load(words + at, mask=held, other=0)
        row = first_row + from_first
        in_u = (row < m)[:, None] & (k < r)[None, :]
        u = tl.load(U + batch * m * r + row[:, None] * r + k[None, :], mask=in_u, other=0.0)
        u = (u.to(tl.float32) * c[None, :]).to(u.dtype)
        even = (old << 16).to(tl.float32, bitcast=True) * decay - step_size * _product(u, v_even)
        odd = (old & 0xFFFF0000).to(tl.float32, bitcast=True) * decay - step_size * _product(u, v_odd)
        bits = _mix((before.to(tl.uint32) + at.to(tl.uint32)) ^ key)
        even_word = (_word(even) + _turned(bits, turn)) >> 16
        odd_word = (_word(odd) + _turned(bits >> 16, turn)) & 0xFFFF0000
        tl.store(words + at, odd_word | even_word, mask=held)


@triton.jit
def _turned(bits, turn):
    """The low 16 of them in this step."""
    return (bits + turn) & 0xFFFF


@triton.jit
def _word(x):
    """The bits of fp32. A GPU's own NaN has all of them set but the sign: random bits on top would make it -0."""
    return tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)


@triton.jit
def _any(c):
    """Whether one of them is not zero; a NaN is not zero."""
    return tl.max((c.to(tl.float32) != 0).to(tl.int32), axis=0) > 0


@triton.jit
def _product(a, b):
    """In fp32; TF32, which a dot of fp32 takes by default, would lose half of their digits."""
    return tl.dot(a, b, input_precision="ieee")
