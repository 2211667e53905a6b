"""Weights of eight bits: the format, what may be done with one, and what an update writes."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ds_mofa.kernels.int8 import GROUP, Int8Weight, quantized, widened
from ds_mofa.kernels.random_bits import Rounding
from ds_mofa.kernels.shard import Shard, runs
from ds_mofa.weights.int8 import put_in, take_out
from ds_mofa.weights.write import write_updates


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spacings(weight: Int8Weight) -> torch.Tensor:
    """Of each weight's grid."""
    return torch.exp2(weight.exponents.float() - 127).repeat_interleave(GROUP, -1)


# ---------------------------------------------------------------------- the format


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_each_weight_is_the_nearest_on_a_grid_as_fine_as_seven_bits_allow(scale):
    values = normal(50, 96) * scale
    weight = Int8Weight.of(values)
    assert (weight.widened() - values).abs().le(spacings(weight) / 2).all()
    largest = weight.codes.view(50, 3, GROUP).abs().amax(-1)
    assert largest.ge(63).all(), "a grid twice as fine has no room"
    assert largest.le(127).all()


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=GROUP, max_size=GROUP))
@settings(deadline=None)
def test_a_bf16_tensor_holds_them_exactly(values):
    """And finding the exponents anew from it gives the same weights: a checkpoint in bf16 loses nothing."""
    weight = Int8Weight.of(torch.tensor([values]))
    saved = widened(weight.codes, weight.exponents, torch.bfloat16)
    assert torch.equal(saved.float(), weight.widened())
    assert torch.equal(Int8Weight.of(saved).widened(), saved)
    assert weight.codes.abs().max() <= 127


@pytest.mark.parametrize("largest, codes", [(127.0, 127), (127.00001, 64), (64.0, 64), (63.5, 127)])
def test_the_exponent_is_the_least_that_has_room(largest, codes):
    values = torch.zeros(1, GROUP)
    values[0, 3] = largest
    assert quantized(values)[0][0, 3] == codes


def test_what_is_no_number_stays_none():
    values = normal(2, 64)
    values[0, 0], values[1, 40] = float("nan"), float("-inf")
    wide = Int8Weight.of(values).widened()
    assert wide[0, :32].isnan().all() and wide[1, 32:].isnan().all()
    assert wide[0, 32:].isfinite().all() and wide[1, :32].isfinite().all()


def test_random_bits_choose_between_the_two_neighbours_by_distance():
    values = torch.full((1, GROUP), 0.3)
    values[0, 0] = 127.0
    bits = torch.arange(0, 65536, 64).view(-1, 1).expand(-1, GROUP)
    codes, _ = quantized(values.expand(len(bits), GROUP), bits)
    assert codes[:, 1:].unique().tolist() == [0, 1]
    assert float(codes[:, 1].float().mean()) == pytest.approx(0.3, abs=1e-3)
    assert codes[:, 0].eq(127).all()


# ---------------------------------------------------------------------- the tensor


def a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 64), nn.Linear(64, 64), nn.Linear(64, 11, bias=False)).bfloat16()
    model[2].weight = model[0].weight  # tied
    return model


def in_eight_bits():
    model = a_model()
    put_in(model, [model[0].weight, model[1].weight])
    return model


def test_a_parameter_stays_the_object_that_it_is():
    model = a_model()
    before = [model[0].weight, model[1].weight]
    before[1].mark = "a backend's"
    put_in(model, before)
    assert all(isinstance(param, Int8Weight) and isinstance(param, nn.Parameter) for param in before)
    assert model[0].weight is model[2].weight is before[0] and model[1].weight is before[1]
    assert before[1].mark == "a backend's" and before[1].requires_grad
    take_out(model)
    assert not any(isinstance(param, Int8Weight) for param in before)
    assert model[1].weight is before[1] and before[1].mark == "a backend's" and not hasattr(before[1], "codes")


def test_it_computes_as_the_wide_one():
    model = in_eight_bits()
    wide = a_model()
    wide.load_state_dict(model.state_dict())
    ids = torch.arange(11)
    for one in (model, wide):
        one(ids).square().sum().backward()
    assert torch.equal(model(ids), wide(ids))
    for param, other in zip(model.parameters(), wide.parameters()):
        assert type(param.grad) is torch.Tensor and torch.equal(param.grad, other.grad)


@pytest.mark.parametrize("ids", [torch.tensor(3), torch.tensor([[1, 1], [0, 10]]), torch.zeros(0, dtype=torch.long)])
def test_an_embedding_reads_its_rows(ids):
    weight = Int8Weight.of(normal(11, 64))
    assert torch.equal(F.embedding(ids, weight), weight.widened()[ids])


def test_a_penalty_on_a_slice_is_differentiated():
    weight = in_eight_bits()[1].weight
    weight[2:5].square().sum().backward()
    expected = torch.zeros(64, 64, dtype=torch.bfloat16)
    expected[2:5] = 2 * weight.widened()[2:5]
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize(
    "write", [
        lambda w: w.add_(1e-6), lambda w: w.mul_(0.5), lambda w: w.zero_(), lambda w: w[0].zero_(),
        lambda w: w.view(-1)[:3].fill_(1.0), lambda w: torch.add(w, 1.0, out=w), lambda w: nn.init.normal_(w),
        lambda w: torch._foreach_mul_([torch.ones(3), w], 0.5),
    ],
)  # fmt: skip
def test_a_write_that_might_be_lost_is_refused(write):
    weight = in_eight_bits()[1].weight
    before = weight.widened()
    with pytest.raises(NotImplementedError, match=r"weight\.widened\(\).*weight\.copy_\(\)"):
        write(weight.data)
    assert torch.equal(weight.widened(), before)


def test_copying_into_it_rounds_to_the_nearest_and_counts_as_a_write():
    weight = in_eight_bits()[1].weight
    version = weight._version
    values = normal(64, 64, seed=1)
    with torch.no_grad():
        weight.copy_(values)
    assert weight._version > version
    assert torch.equal(weight.widened().float(), Int8Weight.of(values).widened())
    plain = torch.zeros(64, 64)
    plain.copy_(weight.detach())
    assert torch.equal(plain, weight.widened().float())


def test_casting_and_moving_keep_the_values():
    model = in_eight_bits()
    values = model[1].weight.widened()
    model.float()
    assert isinstance(model[1].weight, Int8Weight) and model[1].weight.dtype == torch.float32
    assert torch.equal(model[1].weight.widened(), values.float())
    with pytest.raises((NotImplementedError, RuntimeError), match="bfloat16, float32 or float64"):
        model[1].weight.half()


def test_a_copy_of_the_model_has_weights_of_its_own():
    model = in_eight_bits()
    model[1].weight.grad = torch.ones(64, 64, dtype=torch.bfloat16)
    other = copy.deepcopy(model)
    assert isinstance(other[1].weight, nn.Parameter) and other[1].weight.requires_grad and other[1].weight.grad is None
    with torch.no_grad():
        other[1].weight.copy_(torch.zeros(64, 64))
    assert model[1].weight.widened().any() and not other[1].weight.widened().any()
    assert other[0].weight is other[2].weight


def test_a_state_dict_has_ordinary_tensors():
    model = in_eight_bits()
    state = model.state_dict()
    assert all(type(value) is torch.Tensor and value.dtype == torch.bfloat16 for value in state.values())
    assert state["0.weight"] is state["2.weight"], "tied"
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = in_eight_bits()
    with torch.no_grad():
        other[1].weight.copy_(torch.zeros(64, 64))
    other.load_state_dict(torch.load(file, weights_only=True))
    for param, same in zip(model.parameters(), other.parameters()):
        assert torch.equal(param.detach().clone().float(), same.detach().clone().float())
    take_out(model)
    assert model.state_dict()["1.weight"].data_ptr() == model[1].weight.data_ptr(), "the hook is gone"


def test_it_is_not_moved_under_a_graph_or_a_hook():
    model = a_model()
    loss = model(torch.arange(3)).sum()
    with pytest.raises(RuntimeError, match="before the first forward"):
        put_in(model, [model[1].weight])
    del loss
    model[1].weight.register_hook(lambda grad: None)
    with pytest.raises(RuntimeError, match="a hook stands on it"):
        put_in(model, [model[1].weight])


@pytest.mark.parametrize("shared", [False, True])
def test_a_compiled_forward_computes_the_same(shared):
    model = in_eight_bits() if shared else in_eight_bits()[1]
    x = torch.arange(11) if shared else normal(5, 64).bfloat16()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


# ---------------------------------------------------------------------- the write


def small_integers(*shape, seed):
    """Their products are exact in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def written(weights: list[Int8Weight], coefficients=None, *, shards=None, stochastic=True, step=3, decay=0.75):
    B, (m, n), r = len(weights), weights[0].shape, 5
    U, V = small_integers(B, m, r, seed=1), small_integers(B, n, r, seed=2)
    coefficients = torch.ones(B, r) if coefficients is None else coefficients
    if shards is None:
        shards = [Shard(one.codes.view(-1), exponents=one.exponents.view(-1)) for one in weights]
    how = dict(numbers=torch.arange(B), step_size=2.0**-9, decay=decay, rounding=Rounding(stochastic, 7, step))
    write_updates(shards, U, V, coefficients, **how)
    return U @ V.mT * 2.0**-9


def test_an_update_lands_on_one_of_the_two_neighbours():
    weight = Int8Weight.of(normal(70, 96))
    exact = weight.widened() * 0.75
    exact -= written([weight])[0]
    assert (weight.widened() - exact).abs().lt(spacings(weight)).all()
    _, exponents = quantized(exact)
    assert torch.equal(weight.exponents, exponents), "found anew, from the exact values"


def test_nothing_is_lost_in_the_mean():
    count, n = 400, 64
    weights = [Int8Weight.of(torch.full((1, n), 1.0)) for _ in range(count)]
    start = weights[0].widened()
    shards = [Shard(one.codes.view(-1), exponents=one.exponents.view(-1)) for one in weights]
    how = dict(step_size=1.0, decay=1.0, numbers=torch.arange(count))
    small = 2.0**-11  # a thirty-second of the spacing
    U, V, ones = torch.full((count, 1, 1), small), torch.ones(count, n, 1), torch.ones(count, 1)
    for step in range(40):
        write_updates(shards, U, V, ones, rounding=Rounding(True, 0, step), **how)
    fallen = torch.cat([start - one.widened() for one in weights]) / (40 * small)
    assert float(fallen.mean()) == pytest.approx(1, abs=0.02)
    # 40 thirty-seconds are 1.25 spacings: bits drawn anew would leave 1.1 of standard deviation, these 0.5.
    assert float((fallen * 1.25).std()) < 0.6
    write_updates(shards, U, V, ones, rounding=Rounding(False), **how)
    assert torch.equal(torch.cat([one.widened() for one in weights]), start - fallen * 40 * small), (
        "to the nearest: lost"
    )


def test_a_matrix_without_a_gradient_stays():
    weights = [Int8Weight.of(normal(8, 64, seed=seed)) for seed in range(3)]
    before = [one.widened() for one in weights]
    coefficients = torch.ones(3, 5)
    coefficients[1] = 0
    written(weights, coefficients)
    assert [torch.equal(one.widened(), old) for one, old in zip(weights, before)] == [False, True, False]


def test_rows_are_written_as_the_whole_is():
    whole, parts = (Int8Weight.of(normal(70, 96)) for _ in range(2))
    written([whole])
    for first, last in ((0, 13), (13, 70)):
        U, V = small_integers(1, 70, 5, seed=1), small_integers(1, 96, 5, seed=2)
        shard = Shard(parts.codes[first:last].view(-1), first * 96, exponents=parts.exponents[first:last].view(-1))
        how = dict(numbers=torch.arange(1), step_size=2.0**-9, decay=0.75, rounding=Rounding(True, 7, 3))
        write_updates([shard], U, V, torch.ones(1, 5), **how)
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.exponents, whole.exponents)


def test_matrices_of_a_stack_are_written_as_single_ones():
    single = [Int8Weight.of(normal(8, 64, seed=seed)) for seed in range(4)]
    stack = Int8Weight.of(torch.stack([normal(8, 64, seed=seed) for seed in range(4)]))
    written(single)
    shard = Shard(stack.codes.view(-1), exponents=stack.exponents.view(-1))
    (some,) = [run.of(shard) for run in runs(0, stack.numel(), 8 * 64, 0, 4)]
    written(single[:0] or [Int8Weight.of(normal(8, 64))] * 4, shards=[some])
    assert torch.equal(stack.codes, torch.stack([one.codes for one in single]))
    assert torch.equal(stack.exponents, torch.stack([one.exponents for one in single]))
