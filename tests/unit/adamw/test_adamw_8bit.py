"""AdamW's moments in 8 bits: their bytes, how far updates are from fp32 ones, rounding, resuming, compiling, refusals."""

import copy
import io
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_mofa import MoFaSGD, OptionError, Options
from ds_mofa.adamw import eight_bit as adamw_8bit
from ds_mofa.adamw.eight_bit import BLOCK, SMALLEST, AdamW8bit, moment_bytes, rounding_seed


class Model(nn.Module):
    """An embedding and a head of 19 264 elements each, 64 past the last block, a matrix for MoFaSGD and its bias."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(301, 64)
        self.linear = nn.Linear(64, 64)
        self.head = nn.Linear(64, 301, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + torch.tanh(self.linear(x)))


def built(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    model = Model().to(dtype)
    return model, MoFaSGD(model, **{"lr": 2e-2, "adjust_lr_fn": "adamw", "rank": 4, "adamw_states": "8bit", **options})


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        tokens = torch.randint(0, 301, (256,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).float(), (tokens * 7 + 3) % 301)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def steps_of(make, start, grads):
    """The parameter after a step on each gradient; ``make`` builds its optimizer."""
    param = nn.Parameter(start.clone())
    optimizer = make([param])
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
    return param.detach(), optimizer


def eight_bit(**options):
    return lambda params: AdamW8bit(params, Options(lr=1e-3, **options))


def full(params):
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)


# ---------------------------------------------------------------------- what it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_as_full_moments_do(dtype):
    """From a loss of ln 301 = 5.7 to where nearly all is learnt; the mean loss on the way is within 1 % of full moments',
    that of the second half within 3 % (over 16 seeds 0.993 to 1.019; of the last ten steps alone 0.967 to 1.049).
    """
    means, ends = {}, {}
    for states in ("full", "8bit"):
        losses = train(*built(dtype=dtype, adamw_states=states), range(120))
        means[states], ends[states] = sum(losses) / 120, sum(losses[60:]) / 60
        assert sum(losses[-10:]) / 10 < 0.01 * losses[0]
    assert means["8bit"] == pytest.approx(means["full"], rel=0.01)
    # In bf16, full moments lose updates to rounding to nearest.
    assert ends["8bit"] < 1.03 * ends["full"]
    assert ends["8bit"] > 0.97 * ends["full"] or dtype == torch.bfloat16


def test_a_number_of_a_moment_takes_a_byte():
    model, optimizer = built()
    train(model, optimizer, range(1))
    for param in (model.embedding.weight, model.head.weight):
        state = {name: value for name, value in optimizer.adamw.state[param].items() if name != "step"}
        size = sum(value.numel() * value.element_size() for value in state.values())
        assert size == 2 * moment_bytes(param.numel()) == 2 * (19_200 + 4 * 75 + 4 * 64)
        assert sum(v.numel() for n, v in state.items() if v.dtype == torch.uint8) == 2 * 19_200
    bias = optimizer.adamw.state[model.linear.bias]
    assert bias["exp_avg"].dtype == bias["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize(
    "numel, coded", [(1, 0), (4095, 0), (4096, 4096), (4097, 4096), (4351, 4096), (4352, 4352), (10**9, 10**9)]
)
def test_what_has_8_bits(numel, coded):
    coded -= coded % BLOCK
    assert moment_bytes(numel) == coded + coded // BLOCK * 4 + 4 * (numel - coded)
    summary = AdamW8bit([nn.Parameter(torch.zeros(1))], Options()).summary([torch.empty(numel, device="meta")])
    assert f"{coded:,} of {numel:,}" in summary
    assert (f"32 for {numel - coded:,} " in summary) == (coded < numel)


def test_construction_prints_how_many_parameters_have_8_bits(capsys):
    built()
    assert "8 bits for 38,400 of 38,592 parameters, 32 for 192" in capsys.readouterr().out


# ---------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("numel", [SMALLEST, SMALLEST + 2, SMALLEST - 1, 3 * SMALLEST + 255])
def test_updates_are_near_those_of_full_moments(numel):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(numel, generator=generator)
    grads = [torch.randn(numel, generator=generator) for _ in range(20)]
    (ours, optimizer), (wanted, _) = steps_of(eight_bit(), start, grads), steps_of(full, start, grads)
    error = float((ours - wanted).norm() / (wanted - start).norm())
    if numel < SMALLEST:
        assert error < 1e-4
    else:  # a code is within 4 % of most numbers
        assert 1e-4 < error < 0.04
        rest = numel % BLOCK
        torch.testing.assert_close(ours[numel - rest :], wanted[numel - rest :])
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 20


def test_a_piece_is_stepped_as_the_whole(monkeypatch):
    grads = [torch.randn(5 * SMALLEST + 7, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    start = torch.zeros_like(grads[0])
    whole, _ = steps_of(eight_bit(), start, grads)
    monkeypatch.setattr(adamw_8bit, "_PIECE", 2 * SMALLEST)
    pieces, _ = steps_of(eight_bit(), start, grads)
    assert torch.equal(whole, pieces)


def test_a_token_that_does_not_come_back_is_not_divided_by_eps():
    """Gradients in the first step alone: torchao's own, whose second moments round to zero, moves a weight 500 times as
    far as full moments do.
    """
    grads = [0.01 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))]
    grads += [torch.zeros(64, 256)] * 19
    (ours, _), (wanted, _) = (
        steps_of(eight_bit(), torch.zeros(64, 256), grads),
        steps_of(full, torch.zeros(64, 256), grads),
    )
    assert ours.abs().max() < 2 * wanted.abs().max()
    assert (ours - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    grads = [torch.randn(SMALLEST + 7, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    wanted, _ = steps_of(eight_bit(), torch.zeros_like(grads[0]), grads)
    adamw_8bit._torchao.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        found, _ = steps_of(eight_bit(), torch.zeros_like(grads[0]), grads)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


def test_the_groups_have_their_own_lr_and_weight_decay():
    first, second = (nn.Parameter(torch.ones(SMALLEST)) for _ in range(2))
    optimizer = AdamW8bit([{"params": [first], "weight_decay": 0.5, "lr": 0.1}, {"params": [second]}], Options(lr=1e-3))
    for param in (first, second):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.allclose(first, torch.full_like(first, 0.95))
    assert torch.equal(second, torch.ones_like(second))


def test_one_schedule_moves_both_parts():
    model, optimizer = built(lr=2e-3, adamw_lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 1 else 0.0)
    train(model, optimizer, range(1))
    scheduler.step()
    before = model.embedding.weight.detach().clone()
    train(model, optimizer, range(1, 2))
    assert torch.equal(model.embedding.weight, before)


# ---------------------------------------------------------------------- rounding into bf16


def moved(rounding):
    """Mean movement in 10 steps of a thousandth of half a spacing each, over the intended one, and the default
    generator's next number.
    """
    torch.manual_seed(5)
    start = torch.ones(1 << 16, dtype=torch.bfloat16)
    make = lambda params: AdamW8bit(params, Options(lr=4e-6, rounding=rounding))  # noqa: E731
    end, _ = steps_of(make, start, [torch.ones(1 << 16)] * 10)
    return float((start.float() - end.float()).mean()) / 4e-5, torch.rand(()).item()


def test_small_updates_of_bf16_weights_arrive_in_the_mean():
    """Below 1 a spacing is 2^-8: a weight moves with probability 4e-6 * 2^8 a step, 671 of 65 536 in ten; 3 standard
    deviations of that are 12 %.
    """
    share, _ = moved("stochastic")
    assert share == pytest.approx(1.0, abs=0.12)


def test_rounding_to_nearest_loses_them():
    assert moved("nearest")[0] == 0.0


def test_no_two_steps_parameters_and_groups_round_with_the_same_bits():
    """Each element of 130 equal parameters in two groups, in two steps: as many patterns as there are."""
    params = [nn.Parameter(torch.ones(300).bfloat16()) for _ in range(130)]
    optimizer = AdamW8bit([{"params": params[:70]}, {"params": params[70:]}], Options(lr=2e-3))
    patterns = []
    for _ in range(2):
        for param in params:
            with torch.no_grad():
                param.fill_(1)
            param.grad = torch.ones_like(param)
        optimizer.step()
        patterns += [tuple(param.tolist()) for param in params]
    assert len(set(patterns)) == len(patterns) and len({value for one in patterns for value in one}) == 2


def test_rounding_seeds_are_the_runs_the_steps_and_the_parameters():
    seeds = [rounding_seed(0, step, index, 70) for step in range(1, 400) for index in range(70)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    others = {rounding_seed(1, step, index, 70) for step in range(1, 400) for index in range(70)}
    assert len(others & set(seeds)) < 10  # of 2^32, two sets of 27 930 have a fifth of one in common
    shared = sum(
        rounding_seed(0, s, 64, 70) == rounding_seed(0, s + d, 0, 70) for s in range(1, 400) for d in range(1, 400)
    )
    assert shared == 0


def test_rounding_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    wanted = torch.rand(()).item()
    assert moved("stochastic")[1] == wanted


# ---------------------------------------------------------------------- more than 2^31 elements

LARGE = 2**31 + 3 * BLOCK + 7


def test_the_pieces_of_a_tensor_beyond_32_bits_cover_it_and_are_small():
    """What the compiler and the library see has 2^24 elements at most, whose indices fit 32 bits."""
    param = torch.empty(LARGE, dtype=torch.bfloat16, device="meta")
    optimizer = AdamW8bit([nn.Parameter(torch.zeros(1))], Options())
    state, end = adamw_8bit._new_state(param), 0
    for view, at in optimizer._pieces(state, LARGE):
        assert at.start == end < at.stop
        for moment in view.values():
            assert moment.numel() == at.stop - at.start <= 2**24
        end = at.stop
    assert end == LARGE
    assert state["exp_avg_codes"].numel() == 2**31 + 3 * BLOCK and state["exp_avg_sq_rest"].numel() == 7


def test_elements_beyond_32_bits_are_stepped_like_any_others(monkeypatch):
    """Of memory that is mostly never touched: only the pieces past 2^31 are stepped, beside a small tensor's."""
    tail = LARGE - 2**31
    pieces = AdamW8bit._pieces

    def last_pieces(self, state, numel):
        return ((view, at) for view, at in pieces(self, state, numel) if numel < 2**31 or at.start >= 2**31)

    monkeypatch.setattr(AdamW8bit, "_pieces", last_pieces)
    ends, generator = [], torch.Generator().manual_seed(0)
    start, grads = torch.randn(tail, generator=generator), [torch.randn(tail, generator=generator) for _ in range(3)]
    for size in (LARGE, SMALLEST + tail):
        param = nn.Parameter(torch.empty(size, dtype=torch.bfloat16))
        param.grad = torch.empty_like(param)
        with torch.no_grad():
            param[-tail:] = start
            if size < LARGE:
                param[:-tail], param.grad[:-tail] = 0, 0
        optimizer = AdamW8bit([param], Options(lr=1e-3, rounding="nearest"))
        for grad in grads:
            param.grad[-tail:] = grad
            optimizer.step()
        ends.append(param.detach()[-tail:].clone())
    assert torch.equal(*ends) and not torch.equal(ends[0], start.bfloat16())


# ---------------------------------------------------------------------- states that are saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(dtype):
    model, optimizer = built(dtype=dtype)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # numbers and plain tensors: no object of torchao's
    other, resumed = built(seed=1, dtype=dtype)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    torch.rand(7)  # whatever else has drawn from the default generator
    train(other, resumed, range(3, 6))
    for name, param in model.named_parameters():
        assert torch.equal(param, other.get_parameter(name)), name


@pytest.mark.parametrize("saved, here", [("full", "8bit"), ("8bit", "full")])
def test_states_of_the_other_kind_are_refused_and_nothing_has_changed(saved, here):
    model, optimizer = built(adamw_states=saved)
    train(model, optimizer, range(2))
    other, resumed = built(adamw_states=here)
    train(other, resumed, range(1))
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(ValueError, match=f"adamw_states='{saved}', this run has '{here}': set adamw_states='{saved}'"):
        resumed.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(resumed.state_dict(), before, rtol=0, atol=0)


# ---------------------------------------------------------------------- compiling


def test_no_step_compiles_anew(monkeypatch):
    """As on a GPU, with a compiler that generates no code: one graph for each shape of a piece, whatever lr and step."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compiled(function):
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    monkeypatch.setattr(adamw_8bit, "_COMPILED_ON", {"cpu"})
    monkeypatch.setattr(adamw_8bit, "_compiled", compiled)
    monkeypatch.setattr(adamw_8bit, "_PIECE", SMALLEST)
    torch._dynamo.reset()
    params = [nn.Parameter(torch.randn(size)) for size in (4 * SMALLEST, 3 * SMALLEST + 512, 100)]
    plain = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer, other = AdamW8bit(params, Options()), AdamW8bit(plain, Options())
    counts = []
    for step in range(4):
        for param, same in zip(params, plain):
            param.grad = same.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        for one in (optimizer, other):
            one.param_groups[0]["lr"] = 1e-3 / (step + 1)
        optimizer.step()
        counts.append(len(graphs))
        with monkeypatch.context() as eager:
            eager.setattr(adamw_8bit, "_COMPILED_ON", set())
            other.step()
    assert counts == [3, 3, 3, 3]  # a piece, the 512 after three of them, the small parameter
    for param, same in zip(params, plain):
        assert torch.equal(param, same)


# ---------------------------------------------------------------------- refusals


def test_without_torchao_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim.adam", None)
    adamw_8bit._torchao.cache_clear()
    with pytest.raises(OptionError, match=r"pip install 'ds_mofa\[adamw8bit\]', or set adamw_states='full'"):
        built()
    adamw_8bit._torchao.cache_clear()


def test_a_parameter_that_is_not_contiguous_is_refused():
    with pytest.raises(OptionError, match=r"shape \(64, 128\) is not contiguous.*param\.data\.contiguous\(\)"):
        AdamW8bit([nn.Parameter(torch.zeros(128, 64).T)], Options())


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(100, 64, sparse=True)
    optimizer = AdamW8bit(embedding.parameters(), Options())
    embedding(torch.arange(3)).sum().backward()
    with pytest.raises(OptionError, match="without sparse=True"):
        optimizer.step()
