"""Writing the update: the same bits for any split of W, and nothing lost to rounding in the mean."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_mofa.kernels.random_bits import Rounding, random_bits, round_stochastically, rounding_key
from ds_mofa.kernels.shard import Shard
from ds_mofa.weights import write as weights
from ds_mofa.weights.write import write_updates

WHEN = (0, 1, 0)  # seed, step, index of the matrix
SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
ALL = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
CPU = torch.device("cpu")


def _normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _write(
    W, U, V, coefficients=None, *, start=0, step_size=0.01, decay=1.0, rounding="stochastic", when=WHEN, master=None
):
    coefficients = torch.ones(U.shape[1], dtype=U.dtype) if coefficients is None else coefficients
    seed, step, index = when
    write_updates(
        [Shard(W.view(-1), start)],
        U[None],
        V[None],
        coefficients[None],
        numbers=torch.tensor([index]),
        step_size=step_size,
        decay=decay,
        rounding=Rounding(rounding == "stochastic", seed, step),
        masters=None if master is None else [master],
    )


def _key(seed, step, index):
    return rounding_key(Rounding(True, seed, step), index)


KEY = _key(*WHEN)


def _neighbours(x, dtype):
    """The two values of ``dtype`` around fp64 ``x`` (twice x, where it is one), in fp64."""
    nearest = x.to(dtype)
    exact = nearest.double()
    other = torch.nextafter(nearest, torch.where(exact < x, math.inf, -math.inf).to(dtype)).double()
    other = torch.where(exact == x, exact, other)
    return torch.minimum(exact, other), torch.maximum(exact, other)


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_fp64_weights_get_the_dense_update(rounding):
    U, V, coefficients = (_normal(*shape, seed=i).double() for i, shape in enumerate([(7, 3), (5, 3), (3,)]))
    W = _normal(7, 5, seed=3).double()
    expected = 0.9 * W - 0.3 * U @ torch.diag(coefficients) @ V.T
    _write(W, U, V, coefficients, step_size=0.3, decay=0.9, rounding=rounding)
    assert float((W - expected).abs().max()) < 1e-14


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_fp32_weights_get_the_update_to_one_rounding(rounding):
    U, V, coefficients = (_normal(*shape, seed=i) for i, shape in enumerate([(7, 3), (5, 3), (3,)]))
    W = _normal(7, 5, seed=3)
    expected = 0.9 * W.double() - 0.3 * U.double() @ torch.diag(coefficients).double() @ V.double().T
    _write(W, U, V, coefficients, step_size=0.3, decay=0.9, rounding=rounding)
    assert float((W - expected).abs().max()) < 1e-6


@SIXTEEN
def test_nearest_is_the_cast_of_the_fp32_result(dtype):
    U, V, W = _normal(7, 3), _normal(5, 3, seed=1), _normal(7, 5, seed=2).to(dtype)
    exact = W.float()
    _write(exact, U, V)
    _write(W, U, V, rounding="nearest")
    assert torch.equal(W, exact.to(dtype))


@SIXTEEN
def test_stochastic_takes_one_of_the_two_neighbours_of_the_fp32_result(dtype):
    U, V, W = _normal(40, 3), _normal(30, 3, seed=1), _normal(40, 30, seed=2).to(dtype)
    exact = W.float()
    _write(exact, U, V)
    low, high = _neighbours(exact.double(), dtype)
    _write(W, U, V)
    written = W.double()
    assert ((written == low) | (written == high)).all()
    assert 0.3 < float((written == low).double().mean()) < 0.7


@ALL
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_weight_decay_alone(rounding, dtype):
    W = torch.full((4, 6), 2.0, dtype=dtype)
    _write(W, torch.zeros(4, 2), torch.zeros(6, 2), decay=0.75, rounding=rounding)
    assert (W == 1.5).all()


@ALL
def test_a_step_of_nothing_changes_nothing(dtype):
    W = _normal(9, 7).to(dtype)
    before = W.clone()
    _write(W, _normal(9, 2), _normal(7, 2), step_size=0.0)
    assert torch.equal(W, before)
    _write(W, _normal(9, 2), _normal(7, 2), coefficients=torch.zeros(2))
    assert torch.equal(W, before)


@ALL
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_a_matrix_without_coefficients_stays_bit_for_bit(rounding, masters, dtype):
    """Between two that move: no decay, no rounding, nothing into its master, which need not be the weight."""
    W = _normal(3, 9, 7).to(dtype)
    kept = [1.5 * part.float() for part in W.clone()] if masters else None
    before, coefficients = W.clone(), torch.tensor([[1.0, 0.0], [0.0, -0.0], [0.0, math.nan]])
    write_updates(
        [Shard(part.view(-1)) for part in W],
        _normal(3, 9, 2),
        _normal(3, 7, 2),
        coefficients,
        numbers=torch.arange(3),
        step_size=0.1,
        decay=0.75,
        rounding=Rounding(rounding == "stochastic"),
        masters=None if kept is None else [master.view(-1) for master in kept],
    )
    assert torch.equal(W[1], before[1])
    assert not torch.equal(W[0], before[0]) and W[2].isnan().all()
    if kept is not None:
        assert torch.equal(kept[1], 1.5 * before[1].float())
        assert not torch.equal(kept[0], 1.5 * before[0].float()) and kept[2].isnan().all()


@ALL
def test_working_copies_in_the_weights_own_dtype_do(dtype):
    U, V = _normal(7, 3).to(dtype), _normal(5, 3, seed=1).to(dtype)
    W, exact = torch.zeros(7, 5, dtype=dtype), torch.zeros(7, 5, dtype=torch.float64)
    _write(W, U, V, rounding="nearest")
    _write(exact, U.double(), V.double())
    # one rounding to the weights' dtype, not one for each product
    assert float((W.double() - exact).abs().max()) <= float(exact.abs().max()) * torch.finfo(dtype).eps


# ---------------------------------------------------------------------- masters


@SIXTEEN
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_weights_follow_their_master_to_the_nearest(rounding, dtype):
    W = _normal(6, 5).to(dtype)
    master = W.float().view(-1)
    expected = master.clone().view(6, 5)
    for step in range(5):
        U, V = _normal(6, 2, seed=step), _normal(5, 2, seed=step + 50)
        _write(expected, U, V, step_size=1e-4, decay=0.999)
        _write(W, U, V, step_size=1e-4, decay=0.999, rounding=rounding, master=master)
    assert torch.equal(master.view(6, 5), expected)
    assert torch.equal(W, expected.to(dtype))


# ---------------------------------------------------------------------- shards and chunks


def _whole_numbers(*shape, seed):
    # Products and sums of these are exact in fp32, whatever order a GEMM adds them in.
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def _in_pieces(W, cuts, U, V, chunk, monkeypatch, **kwargs):
    monkeypatch.setattr(weights, "_CHUNK", chunk)
    flat = W.clone().view(-1)
    for start, stop in zip([0, *cuts], [*cuts, flat.numel()]):
        _write(flat[start:stop], U, V, start=start, **kwargs)
    return flat.view_as(W)


@ALL
@settings(max_examples=40)
@given(m=st.integers(1, 12), n=st.integers(1, 12), chunk=st.integers(1, 60), data=st.data())
def test_any_split_of_w_writes_the_same_bits(dtype, m, n, chunk, data):
    """Shards that begin in the middle of a row, empty ones, and every cut into chunks."""
    cuts = sorted(data.draw(st.lists(st.integers(0, m * n), max_size=5)))
    U, V = _whole_numbers(m, 3, seed=0), _whole_numbers(n, 3, seed=1)
    W = _normal(m, n, seed=2).to(dtype)
    kwargs = {"step_size": 2.0**-9, "decay": 0.75}
    with pytest.MonkeyPatch.context() as patch:
        whole = _in_pieces(W, [], U, V, 1 << 22, patch, **kwargs)
        pieces = _in_pieces(W, cuts, U, V, chunk, patch, **kwargs)
    assert torch.equal(pieces, whole)
    assert not torch.equal(whole, W) or not U.any() or not V.any()


@pytest.mark.parametrize("chunk", [1, 500, 1 << 22])
@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_a_split_changes_no_more_than_the_order_of_a_gemm_s_sums(dtype, world_size, chunk, monkeypatch):
    """With generic numbers a GEMM of other rows may round its fp32 sums otherwise, and by that alone W may differ."""
    m, n, r = 134, 45, 16
    U, V, W = _normal(m, r), _normal(n, r, seed=1), (0.02 * _normal(m, n, seed=2)).to(dtype)
    length = -(-m * n // world_size)
    cuts = list(range(length, m * n, length))
    whole = _in_pieces(W, [], U, V, 1 << 22, monkeypatch, step_size=1e-4)
    pieces = _in_pieces(W, cuts, U, V, chunk, monkeypatch, step_size=1e-4)
    if dtype == torch.float32:  # the rounding of a sum of r products, and of the difference from W
        rounding = torch.finfo(dtype).eps * (r * 1e-4 * U.abs() @ V.abs().T + W.abs())
        assert ((pieces - whole).abs() <= rounding).all()
    else:
        off = pieces != whole
        assert int(off.sum()) <= 2
        assert torch.equal(pieces[off], torch.nextafter(whole, pieces)[off])  # the other neighbour


@SIXTEEN
def test_a_shard_writes_nothing_beyond_itself(dtype):
    storage = torch.full((40,), 7.0, dtype=dtype)
    _write(storage[10:21], _normal(6, 2), _normal(5, 2), start=8, step_size=1.0)
    assert (storage[:10] == 7).all() and (storage[21:] == 7).all()
    assert not (storage[10:21] == 7).any()


@pytest.mark.parametrize("start", [0, 3, 5, 30])
def test_an_empty_shard_is_left_alone(start):
    empty = torch.empty(0, dtype=torch.bfloat16)
    _write(empty, _normal(6, 2), _normal(5, 2), start=start)
    _write(empty, _normal(6, 2), _normal(5, 2), start=start, master=torch.empty(0))
    assert empty.numel() == 0


def test_a_master_of_a_shard_follows_the_whole_one():
    U, V, W = _whole_numbers(6, 2, seed=0), _whole_numbers(5, 2, seed=1), _normal(6, 5, seed=2).bfloat16()
    whole, part = W.float().view(-1), W.float().view(-1)[7:23].clone()
    shard = W.view(-1)[7:23].clone()
    _write(shard, U, V, start=7, master=part)
    _write(W, U, V, master=whole)
    assert torch.equal(part, whole[7:23]) and torch.equal(shard, W.view(-1)[7:23])


# ---------------------------------------------------------------------- random bits


def _bits(rows=256, n=256, key=KEY):
    return random_bits(0, rows * n, key, CPU).view(rows, n)


def _chi_square_is_plausible(counts):
    """Within five standard deviations (Wilson and Hilferty's): the keys are fixed, so this is no matter of luck."""
    counts = counts.double()
    expected = counts.sum() / counts.numel()
    k = counts.numel() - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return abs(z) < 5


@pytest.mark.parametrize("key", [KEY, 0, 1, 2**32 - 1], ids=str)
@pytest.mark.parametrize("columns", [slice(0, None, 2), slice(1, None, 2)], ids=["even", "odd"])
def test_bits_are_uniform(columns, key):
    bits = _bits(512, 512, key)[:, columns]
    assert bits.min() >= 0 and bits.max() < 1 << 16
    assert _chi_square_is_plausible(torch.bincount(bits.flatten() >> 8, minlength=256))
    assert _chi_square_is_plausible(torch.bincount(bits.flatten() & 255, minlength=256))
    for bit in range(16):
        assert _chi_square_is_plausible(torch.bincount((bits.flatten() >> bit) & 1, minlength=2))


PAIRS = {
    "steps": lambda: (_bits(key=_key(0, 1, 0)), _bits(key=_key(0, 2, 0))),
    "matrices": lambda: (_bits(key=_key(0, 1, 0)), _bits(key=_key(0, 1, 1))),
    "seeds": lambda: (_bits(key=_key(0, 1, 0)), _bits(key=_key(1, 1, 0))),
    "step and matrix exchanged": lambda: (_bits(key=_key(0, 1, 2)), _bits(key=_key(0, 2, 1))),
    "rows": lambda: (_bits()[:-1], _bits()[1:]),
    "distant rows": lambda: (_bits()[:-128], _bits()[128:]),
    "columns of one word": lambda: (_bits()[:, ::2], _bits()[:, 1::2]),
    "columns of two words": lambda: (_bits()[:, :-2], _bits()[:, 2:]),
    "neighbouring keys": lambda: (_bits(key=4), _bits(key=5)),
    "distant keys": lambda: (_bits(key=4), _bits(key=4 + 2**31)),
}


@pytest.mark.parametrize("between", PAIRS)
def test_bits_are_independent_between(between):
    one, other = (bits.flatten() for bits in PAIRS[between]())
    joint = torch.bincount((one >> 12) * 16 + (other >> 12), minlength=256)
    assert _chi_square_is_plausible(joint)
    joint = torch.bincount((one & 15) * 16 + (other & 15), minlength=256)
    assert _chi_square_is_plausible(joint)
    correlation = torch.corrcoef(torch.stack([one, other]).double())[0, 1]
    assert abs(float(correlation)) < 6 / math.sqrt(one.numel())


def test_bits_depend_on_the_element_alone():
    whole = random_bits(0, 100, KEY, CPU)
    for first, count in ((0, 100), (1, 99), (7, 2), (50, 50), (99, 1), (3, 0)):
        assert torch.equal(random_bits(first, count, KEY, CPU), whole[first : first + count])
    # beyond what 32 bits count
    assert torch.equal(random_bits(2**34 + 5, 3, KEY, CPU), random_bits(2**34, 8, KEY, CPU)[5:])


def test_keys_and_bits_are_fixed_across_runs_and_versions():
    """A run resumed by a later version rounds as before, and so does every kernel: these numbers are a promise."""
    assert _key(0, 1, 2) == 242382369
    assert _key(7, 1000, 31) == 4268595966
    assert random_bits(14, 6, _key(0, 1, 2), CPU).tolist() == [23562, 20613, 59236, 44602, 46406, 48249]
    assert random_bits(300001, 3, _key(7, 1000, 31), CPU).tolist() == [45612, 39894, 61091]


def test_no_two_keys_are_alike():
    keys = {_key(seed, step, index) for seed in range(5) for step in range(20) for index in range(20)}
    keys |= {_key(2**31 - 1, 10**9, 10**6)}
    assert len(keys) == 5 * 20 * 20 + 1


# ---------------------------------------------------------------------- stochastic rounding


def _values(dtype):
    """fp32 values of every size that ``dtype`` has, its subnormal ones included, and both signs."""
    info = torch.finfo(dtype)
    exponents = torch.arange(-30, 8) if dtype == torch.float16 else torch.arange(-120, 100, 10)
    fractions = 1 + _normal(len(exponents), 40).abs() % 1
    x = (fractions * torch.exp2(exponents.float()).unsqueeze(1)).flatten()
    x = x[x < info.max / 2]
    return torch.cat([x, -x, torch.tensor([info.tiny, -info.tiny, info.smallest_normal, info.max, 0.0])])


@SIXTEEN
def test_every_value_goes_up_with_the_probability_of_its_distance(dtype):
    """Over all 2^16 random words, so without chance: the mean is x itself.

    fp16's subnormal values drop more bits of x than the 16 that a random word has, and may miss by its grain.
    """
    words = torch.arange(1 << 16)
    for x in _values(dtype)[::7].tolist():
        x = torch.tensor(x)
        rounded = round_stochastically(x.expand(words.shape), words, dtype).double()
        low, high = _neighbours(x.double(), dtype)
        assert ((rounded == low) | (rounded == high)).all(), float(x)
        assert torch.equal(rounded, rounded.to(dtype).double())
        spacing = float(high - low)
        grain = 2.0**-16 if dtype == torch.float16 and abs(x) < 2.0**-14 else 1e-9
        assert abs(float(rounded.mean() - x.double())) <= grain * spacing, float(x)


@SIXTEEN
@pytest.mark.parametrize("sign", [1, -1])
def test_values_of_the_dtype_stay_whatever_the_bits(sign, dtype):
    words = torch.arange(1 << 16)
    patterns = torch.arange(0, 0x7BFF if dtype == torch.float16 else 0x7F7F, 97, dtype=torch.int16)
    for x in (sign * patterns.view(dtype)).float()[:, None].split(16):
        x = x.expand(-1, len(words))
        assert torch.equal(round_stochastically(x, words.expand_as(x), dtype), x)


@SIXTEEN
@pytest.mark.parametrize("size", [0.02, 1.0, 3e-5, 3e-7], ids=["0.02", "1", "3e-5", "3e-7"])
@pytest.mark.parametrize("share_of_spacing", [0.1, 0.01])
def test_small_updates_arrive_in_the_mean_and_are_lost_to_nearest(share_of_spacing, size, dtype):
    """Weights of about ``size`` (in fp16 the last two are subnormal), moved far less than half their spacing."""
    m = n = 64
    steps = 50
    W = (size * (1 + _normal(m, n).abs() / 10)).to(dtype)
    spacing = float((torch.nextafter(W, torch.tensor(math.inf, dtype=dtype)) - W).double().mean())
    wanted = share_of_spacing * spacing * steps
    arrived = {}
    for rounding in ("stochastic", "nearest"):
        written = W.clone()
        for step in range(steps):
            _write(
                written,
                -torch.ones(m, 1),
                torch.ones(n, 1),
                step_size=wanted / steps,
                rounding=rounding,
                when=(0, step, 0),
            )
        arrived[rounding] = float((written.double() - W.double()).mean()) / wanted
    # The mean of m n random walks of 50 steps: its standard deviation in units of what is wanted.
    deviation = math.sqrt(steps * share_of_spacing / (m * n)) / (share_of_spacing * steps)
    assert arrived["stochastic"] == pytest.approx(1, abs=5 * deviation)
    assert 5 * deviation < 0.25
    assert abs(arrived["nearest"]) < 0.01


@SIXTEEN
def test_rounding_to_nearest_loses_most_of_generic_small_updates_too(dtype):
    """Updates of 1e-6 rms on weights of 0.02 rms, 50 steps: what arrives along the intended direction."""
    m, n = 128, 96
    W = (0.02 * _normal(m, n, seed=1)).to(dtype)
    arrived = {}
    U, V = _normal(m, 4, seed=2), _normal(n, 4, seed=3)
    step_size = 1e-6 / 2 if dtype == torch.bfloat16 else 1e-7 / 2  # fp16's spacing is eight times finer
    wanted = -50 * step_size * (U @ V.T).double()
    for rounding in ("stochastic", "nearest"):
        written = W.clone()
        for step in range(50):
            _write(written, U, V, step_size=step_size, rounding=rounding, when=(0, step, 0))
        moved = written.double() - W.double()
        arrived[rounding] = float((moved * wanted).sum() / wanted.square().sum())
    assert arrived["stochastic"] == pytest.approx(1, abs=0.15)
    assert arrived["nearest"] < 0.1


@SIXTEEN
def test_two_steps_round_differently_and_one_step_twice_alike(dtype):
    def written(*when):
        W = torch.ones(32, 32, dtype=dtype)
        _write(W, torch.ones(32, 1), torch.ones(32, 1), step_size=1e-4, when=when)
        return W

    assert torch.equal(written(0, 5, 3), written(0, 5, 3))
    for other in ((0, 6, 3), (0, 5, 4), (1, 5, 3)):
        assert not torch.equal(written(0, 5, 3), written(*other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("word", [0x7FFFFFFF, 0x7FC00000, -1])  # a GPU's NaN, a CPU's, one with the sign
def test_a_nan_stays_one_whatever_the_bits(word, dtype):
    x = torch.tensor([word], dtype=torch.int32).view(torch.float32)
    for bits in (0, 1, 0xFFFF):
        assert round_stochastically(x, torch.tensor([bits]), dtype).to(dtype).isnan().all()


def _counts(steps, share, bits_of):
    """How often in so many steps each element's bits were below a share of their range."""
    return sum((bits_of(step) < share * 65536).double() for step in range(100, 100 + steps))


@pytest.mark.parametrize("share", [0.02, 0.37, 0.5])
@pytest.mark.parametrize("steps", [50, 1000])
def test_over_steps_the_bits_of_an_element_fill_their_range_evenly(steps, share):
    """As often as they should, give or take two; draws give or take what a coin does."""
    key = Rounding(True, 5).weight_key(3)
    ours = _counts(steps, share, lambda step: random_bits(0, 500, key, CPU, Rounding(True, 5, step).turn))
    assert (ours - steps * share).abs().max() < 3
    assert float(ours.mean()) == pytest.approx(steps * share, abs=0.1)
    drawn = _counts(steps, share, lambda step: random_bits(0, 500, _key(5, step, 3), CPU))
    assert float(drawn.std()) == pytest.approx(math.sqrt(steps * share * (1 - share)), rel=0.2)
