"""CoMERA against dense weights in float64: layers, order of contraction, pruning, both stages, and as a comparison uses it."""

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from ds_mofa.options import OptionError
from experiments.baselines import comera
from experiments.baselines.comera.contraction import best_path, contract
from experiments.baselines.comera.layers import TensorTrainEmbedding, TensorTrainLinear
from experiments.baselines.comera.objective import TrainSizes
from experiments.baselines.comera.trains import bounded_ranks, factors, full, gaussian_cores, padded_factors, tt_svd
from experiments.comparison.training import train as compare
from tests.experiments.comparisons import language_plan
from tests.unit.dense_reference import relative_error

THRESHOLD = 1e-2


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cores_of(dims, rank, seed=0):
    ranks = bounded_ranks(dims, rank)
    return [randn(a, n, b, seed=seed + k) for k, (a, n, b) in enumerate(zip(ranks, dims, ranks[1:]))]


def with_diagonal(train, seed=50):
    """Entries around 1, and every fourth too small to count."""
    with torch.no_grad():
        train.diagonal.copy_(1 + 0.3 * randn(train.diagonal.numel(), seed=seed))
        train.diagonal[::4] = 0.5 * THRESHOLD
    return train


def linear(inputs=(3, 2), outputs=(2, 4), rank=3, bias=True, seed=0):
    b = nn.Parameter(randn(math.prod(outputs), seed=seed + 20)) if bias else None
    return with_diagonal(TensorTrainLinear(cores_of((*inputs, *outputs), rank, seed), THRESHOLD, b))


def embedding(rows=(3, 2, 4), columns=(2, 1, 3), count=22, rank=3):
    return with_diagonal(
        TensorTrainEmbedding(cores_of([v * e for v, e in zip(rows, columns)], rank), THRESHOLD, rows, count)
    )


def matrices(train):
    """Its cores, and the diagonals as matrices, from which autograd of the dense product goes on."""
    cores = [core.detach().clone().requires_grad_() for core in train.cores]
    D = train.diagonal.detach().clone().requires_grad_()
    live = [torch.where(part > THRESHOLD, part, 0.0).diag() for part in D.split(train.ranks)]
    return cores, D, live


def entry(cores, live, place):
    """T[place], as a product of matrices."""
    out = cores[0][:, place[0], :]
    for core, D, i in zip(cores[1:], live, place[1:]):
        out = out @ D @ core[:, i, :]
    return out[0, 0]


def dense_linear(train, cores, live):
    """W (m, n), entry by entry."""
    half = len(train.dims) // 2
    spaces = [[range(n) for n in side] for side in (train.dims[half:], train.dims[:half])]
    rows = [
        torch.stack([entry(cores, live, (*i, *o)) for i in itertools.product(*spaces[1])])
        for o in itertools.product(*spaces[0])
    ]
    return torch.stack(rows)


def dense_embedding(train, cores, live):
    rows = itertools.islice(itertools.product(*map(range, train.rows)), train.num_embeddings)
    columns = list(itertools.product(*map(range, train.columns)))
    return torch.stack(
        [
            torch.stack(
                [entry(cores, live, [v * e + j for v, e, j in zip(row, train.columns, column)]) for column in columns]
            )
            for row in rows
        ]
    )


# ---------------------------------------------------------------------- shapes


def test_factors_have_the_least_sum():
    for number, count in itertools.product((8, 12, 24, 60, 7), (1, 2, 3)):
        ways = [w for w in itertools.product(range(2, number + 1), repeat=count) if math.prod(w) == number]
        found = factors(number, count)
        assert (found is None) == (not ways)
        assert not ways or (
            sum(found) == min(map(sum, ways)) and math.prod(found) == number and list(found) == sorted(found)
        )


def test_the_published_shapes_are_found():
    assert factors(768, 3) == (8, 8, 12) and factors(3072, 3) == (12, 16, 16)
    assert bounded_ranks((12, 8, 8, 8, 8, 12), 30) == (1, 12, 30, 30, 30, 12, 1)
    assert bounded_ranks((12, 8, 8, 12, 16, 16), 30) == (1, 12, 30, 30, 30, 16, 1)
    rows = padded_factors(30522, 4)
    assert 30522 <= math.prod(rows) <= 1.05 * 30522 and sum(rows) <= sum((16, 20, 10, 10))


# ---------------------------------------------------------------------- the order of contraction


def _networks():
    """Layers of one to three cores a side, for few tokens and many, and one network that is no chain."""
    for half, tokens, rank in itertools.product((1, 2), (1, 4, 512), (2, 7)):
        count = 2 * half
        bonds = range(count + 1, 2 * count + 2)
        terms = ((0, *range(1, half + 1)), *((bonds[k], k + 1, bonds[k + 1]) for k in range(count)))
        sizes = (tokens, *(3, 5, 2, 6)[:count], 1, *[rank] * (count - 1), 1)
        yield terms, (0, *range(half + 1, count + 1)), sizes
    yield ((0, 1), (1, 2, 3), (3, 4), (4, 2, 5)), (0, 5), (2, 3, 4, 5, 6, 7)


def _all_costs(tensors, output, sizes):
    """Of every order of contracting these, as sets of indices."""
    if len(tensors) == 1:
        return [0]
    costs = []
    for i, j in itertools.combinations(range(len(tensors)), 2):
        others = [t for k, t in enumerate(tensors) if k not in (i, j)]
        both = tensors[i] | tensors[j]
        needed = set(output).union(*others)
        cost = math.prod(sizes[index] for index in both)
        costs += [cost + rest for rest in _all_costs([*others, both & needed], output, sizes)]
    return costs


def test_the_order_is_the_best_of_all():
    worse = 0
    for terms, output, sizes in _networks():
        costs = _all_costs([frozenset(term) for term in terms], output, sizes)
        assert best_path(terms, output, sizes).multiplications == min(costs)
        worse += min(costs) < max(costs)
    assert worse == len(list(_networks()))  # a search that takes whatever order would be found out


def test_a_contraction_is_the_einsum():
    for terms, output, sizes in _networks():
        operands = [randn(*(sizes[index] for index in term), seed=k) for k, term in enumerate(terms)]
        whole = torch.einsum(*itertools.chain(*zip(operands, terms)), output)
        assert relative_error(contract(best_path(terms, output, sizes), operands), whole) < 1e-12


def test_backward_goes_through_the_same_tree_at_twice_the_price():
    train = linear((4, 4, 2), (2, 4, 4), rank=5, bias=False)
    x = randn(64, 32).requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = train(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    bonds = range(7, 14)
    terms = ((0, 1, 2, 3), *((bonds[k], k + 1, bonds[k + 1]) for k in range(6)))
    path = best_path(terms, (0, 4, 5, 6), (64, *train.dims, 1, *train.ranks, 1))
    assert forward.get_total_flops() == 2 * path.multiplications < 64 * 32 * 32 * 2
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


# ---------------------------------------------------------------------- the layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(), (7,), (2, 5), (0,)], ids=str)
def test_a_linear_is_its_dense_matrix(tokens, bias):
    train = linear(bias=bias)
    x = randn(*tokens, 6, seed=9).requires_grad_()
    cores, D, live = matrices(train)
    W = dense_linear(train, cores, live)
    assert W.shape == (8, 6) and relative_error(train.dense(), W) < 1e-12
    y, expected = train(x), F.linear(x, W, train.bias)
    assert y.shape == (*tokens, 8)
    if not x.numel():
        return
    assert relative_error(y, expected) < 1e-12
    dy = randn(*y.shape, seed=10)
    got = torch.autograd.grad(y, [x, *train.cores, train.diagonal], dy)
    wanted = torch.autograd.grad(expected, [x, *cores, D], dy)
    for value, reference in zip(got, wanted):
        assert relative_error(value, reference) < 1e-12
    assert not got[-1][::4].any() and got[-1].count_nonzero() == len(D) - len(D[::4])


def test_an_embedding_is_its_dense_table():
    train = embedding()
    ids = torch.tensor([[0, 21, 5], [5, 5, 13]])
    cores, D, live = matrices(train)
    table = dense_embedding(train, cores, live)
    assert table.shape == (22, 6) and relative_error(train.dense(), table) < 1e-12
    y, expected = train(ids), table[ids]
    assert y.shape == (2, 3, 6) and relative_error(y, expected) < 1e-12
    dy = randn(*y.shape, seed=10)
    got = torch.autograd.grad(y, [*train.cores, train.diagonal], dy)
    for value, reference in zip(got, torch.autograd.grad(expected, [*cores, D], dy)):
        assert relative_error(value, reference) < 1e-12
    assert train(ids[:0]).shape == (0, 3, 6)
    for wrong in (-1, 22):  # there is a row 22, of the padding
        with pytest.raises(IndexError):
            train(torch.tensor([wrong]))


def test_the_reference_would_tell_a_wrong_layer():
    train = linear()
    cores, _, live = matrices(train)
    W = dense_linear(train, cores, live)
    assert relative_error(full(train.cores).reshape(6, 8).mT, W) > 0.1  # without the diagonals
    assert (
        relative_error(train.dense().reshape(2, 4, 6).transpose(0, 1).reshape(8, 6), W) > 0.1
    )  # outputs in another order


@pytest.mark.parametrize("dims", [(12, 8, 8, 8, 8, 12), (20, 30, 40)], ids=str)
def test_random_cores_have_the_variance_that_was_asked_for(dims):
    torch.manual_seed(0)
    ranks = bounded_ranks(dims, 30)
    sample = torch.stack([full(gaussian_cores(dims, ranks, 0.02, torch.zeros(1))).square().mean() for _ in range(8)])
    # The mean square of one train varies by a tenth or two.
    assert float(sample.mean().sqrt()) == pytest.approx(0.02, rel=0.15)


def test_tt_svd_is_exact_at_full_ranks_and_quasi_optimal_below():
    dims = (3, 4, 2, 5)
    T = randn(*dims)
    whole = tt_svd(T, bounded_ranks(dims, 100))
    assert relative_error(full(whole), T) < 1e-12
    norms = [float(core.norm()) for core in whole]
    assert max(norms) < 20 * min(norms)
    ranks = bounded_ranks(dims, 3)
    error = float((full(tt_svd(T, ranks)) - T).square().sum())
    cut = [
        float(torch.linalg.svdvals(T.reshape(math.prod(dims[:k]), -1))[ranks[k] :].square().sum())
        for k in range(1, len(dims))
    ]
    assert max(cut) <= error <= sum(cut)
    assert torch.equal(full(tt_svd(torch.zeros(dims), ranks)), torch.zeros(dims))


# ---------------------------------------------------------------------- pruning


@torch.no_grad()
@pytest.mark.parametrize("make", [linear, embedding])
def test_pruning_changes_no_function_and_moves_it_by_what_was_cut_at_most(make):
    train = make()
    ranks, before = train.ranks, train.dense()
    every = copy.deepcopy(train)
    every.threshold = 0.0  # nothing is cut off
    bound, D = 0.0, every.diagonal.split(ranks)
    for k in range(len(ranks)):
        # The cut is made from the left: what stands left of it is cut already, what stands right is whole.
        left, right = full([*train.weighted()[:k], train.cores[k]]).flatten(0, -2), full(every.weighted()[k + 1 :])
        for j in (D[k] <= THRESHOLD).nonzero().flatten():
            bound += float(D[k][j] * left[:, j].norm() * right.reshape(ranks[k], -1)[j].norm())
    moved = float((every.dense() - before).norm())
    assert 0 < moved <= bound < 0.2 * float(before.norm())
    assert train.prune() and train.ranks < ranks and train.prune() == []
    assert relative_error(train.dense(), before) < 1e-12
    assert train.diagonal.min() > THRESHOLD and len(train.diagonal) == sum(train.ranks)


def test_pruning_takes_the_moments_along_and_training_goes_on_as_if_the_zeros_were_still_there():
    losses = {every: Toy().train(40, prune_every=every, gamma=1.0, rank_lr=0.1) for every in (0, 1)}
    kept, pruned = losses[0], losses[1]
    assert sum(len(t.diagonal) for t in pruned.trains) < 0.9 * sum(len(t.diagonal) for t in kept.trains)
    assert kept.optimizer.size() == pruned.optimizer.size() == pruned.optimizer._sizes.stored()
    assert kept.losses == pytest.approx(pruned.losses, rel=1e-9)
    other = Toy()  # the control: moments that are forgotten where ranks fall
    other.forgets = True
    assert other.train(40, prune_every=1, gamma=1.0, rank_lr=0.1).losses != pytest.approx(kept.losses, rel=1e-3)


# ---------------------------------------------------------------------- the objective and its stages


class Toy:
    """Two trains, 24 to 24 to 24, that learn the product of a linear map of rank 2, in float64."""

    forgets = False

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False), nn.LayerNorm(24)
        ).double()
        self.x = randn(64, 24, seed=1)
        self.y = self.x @ (randn(24, 2, seed=2) @ randn(2, 24, seed=3)) / 24

    def build(self, **settings):
        self.optimizer = comera.build(self.model, **{"lr": 0.02, "order": 2, "rank": 8, "gamma": 0.0, **settings})
        self.trains = list(self.optimizer.trains.values())
        return self

    def loss(self):
        return (self.model(self.x) - self.y).square().mean() / self.y.square().mean()

    def train(self, steps, **settings):
        self.build(**settings)
        self.losses = self.run(steps)
        return self

    def run(self, steps):
        losses = []
        for _ in range(steps):
            loss = self.loss()
            losses.append(float(loss.detach()))
            self.optimizer.zero_grad()
            self.optimizer.objective(loss).backward()
            self.optimizer.step()
            if self.forgets:
                self.optimizer.state.clear()
        return losses


def mean_of_live(trains):
    entries = [d for train in trains for d in train.diagonal if d > THRESHOLD]
    return sum(entries) / len(entries)


def size_of(trains, ranks_of):
    total = 0.0
    for train in trains:
        ranks = [1.0, *ranks_of(train), 1.0]
        total = total + sum(a * n * b for a, n, b in zip(ranks, train.dims, ranks[1:]))
    return total


def l1(train):
    return [part[part > THRESHOLD].sum() for part in train.diagonal.split(train.ranks)]


def l0(train):
    return [max(1.0, float((part > THRESHOLD).sum())) for part in train.diagonal.split(train.ranks)]


def with_small_diagonals(toy):
    for train in toy.trains:
        with_diagonal(train)
    return toy


def test_sizes_are_those_of_loops_over_bonds():
    trains = with_small_diagonals(Toy().build()).trains
    with torch.no_grad():
        trains[1].diagonal[: trains[1].ranks[0]] = 0.0  # a whole bond
    sizes = TrainSizes(trains)
    assert sizes.stored() == sum(p.numel() for train in trains for p in train.cores)
    assert float(sizes.live()) == pytest.approx(size_of(trains, l0))
    assert float(sizes.mean().detach()) == pytest.approx(float(mean_of_live(trains).detach()))
    assert float(sizes.relaxed().detach()) == pytest.approx(float(size_of(trains, l1).detach()))
    for train in trains:
        train.prune()
    assert TrainSizes(trains).stored() == pytest.approx(size_of(trains, l0))


def gradients(toy, value):
    return torch.autograd.grad(value, [p for train in toy.trains for p in (*train.cores, train.diagonal)])


@pytest.mark.parametrize("penalty", ["mean", "size"])
def test_the_early_objective_is_the_loss_and_the_penalty(penalty):
    toy = Toy().build(gamma=0.7, penalty=penalty)
    first = sum(p.numel() for train in toy.trains for p in train.cores)
    with_small_diagonals(toy)
    loss = toy.loss()
    size = mean_of_live(toy.trains) if penalty == "mean" else size_of(toy.trains, l1) / first
    value = toy.optimizer.objective(loss)
    assert float(value) == pytest.approx(float(loss), rel=1e-12)  # what is reported is the loss
    expected = gradients(toy, toy.loss() + 0.7 * size)
    for got, wanted, plain in zip(gradients(toy, value), expected, gradients(toy, toy.loss())):
        assert relative_error(got, wanted) < 1e-9
        assert got.dim() > 1 or relative_error(got, plain) > 1e-3


@pytest.mark.parametrize("goal", ["loss", "size"])
def test_the_late_objective_lowers_what_is_farther_from_its_target(goal):
    toy = Toy().build(late_after=0, target_loss=1.0, target_ratio=0.5)
    loss = float(toy.loss())
    assert toy.optimizer.target_size == 0.5 * toy.optimizer.size()
    toy.optimizer.target_loss = loss * (0.4 if goal == "loss" else 0.6)
    b = goal == "size"
    expected = gradients(toy, (1.1 - b) * toy.loss() + (0.01 + b) * mean_of_live(toy.trains))
    for got, wanted in zip(gradients(toy, toy.optimizer.objective(toy.loss())), expected):
        assert relative_error(got, wanted) < 1e-9


def test_the_late_stage_makes_the_model_smaller_at_a_bounded_loss():
    """Two seeds of 450 steps end at 242 and 302 of 912 numbers, losses 0.035 and 0.047; without the stage at 912."""
    settings = dict(prune_every=10, gamma=0.01, rank_lr=0.02)
    plain = Toy().train(400, **settings)
    staged = Toy().train(400, late_after=150, target_loss=0.05, target_ratio=0.3, **settings)
    assert staged.losses[:150] == plain.losses[:150]
    assert plain.optimizer.size() == 912 and staged.optimizer.target_size == 0.3 * 912
    assert staged.optimizer.size() < 0.45 * 912
    assert staged.losses[-1] < 0.1 < staged.losses[150]


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit():
    settings = dict(prune_every=5, gamma=1.0, rank_lr=0.1, late_after=15, target_loss=0.05)
    toy = Toy().train(20, **settings)
    file = io.BytesIO()
    torch.save({"model": toy.model.state_dict(), "optimizer": toy.optimizer.state_dict()}, file)
    rest = toy.run(15)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Toy(seed=1).build(**{**settings, "lr": 0.5})
    ranks = [train.ranks for train in again.trains]
    again.model.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    assert [train.ranks for train in again.trains] < ranks
    assert again.run(15) == rest and len(set(rest)) == 15


# ---------------------------------------------------------------------- whole models


class Model(nn.Module):
    """An embedding, a shared linear, a head, and two linears that are tied."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(60, 24, padding_idx=0)
        self.up, self.down = nn.Linear(24, 36), nn.Linear(36, 24)
        self.again = self.up
        self.odd = nn.Linear(24, 23)
        self.twin, self.twin_too = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)
        self.twin_too.weight = self.twin.weight
        self.head = nn.Linear(24, 60, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.down(self.up(x).relu() + self.again(x))
        return self.head(self.twin_too(self.twin(x)))


@pytest.mark.parametrize("tied", [False, True])
def test_what_mofasgd_would_train_becomes_trains_and_the_embedding(tied):
    torch.manual_seed(0)
    model = Model(tied).double()
    ids, head, bias = torch.arange(60).reshape(2, 30), model.head.weight, model.up.bias
    dense = copy.deepcopy(model)
    optimizer = comera.build(model, lr=1e-3, rank=3, embedding_rank=3, order=2, embedding_order=2)
    assert sorted(optimizer.trains) == sorted(["up", "down"] + ["embedding"] * (not tied))
    assert model.again is model.up and model.up.bias is bias and model.head.weight is head
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2, 1e-3]
    before = model(ids)
    assert relative_error(before, dense(ids)) > 0.1  # random
    rest = comera.densify(model)
    assert relative_error(model(ids), before) < 1e-12
    assert [(n, p.shape) for n, p in rest.named_parameters()] == [(n, p.shape) for n, p in dense.named_parameters()]
    excluded = comera.build(copy.deepcopy(dense), lr=1e-3, rank=3, order=2, embedding_order=2, exclude=["up", "emb"])
    assert list(excluded.trains) == ["down"]


def test_weights_can_be_taken_over():
    """A table and a matrix that are of low rank as tensors are kept to rounding; random cores keep nothing."""
    torch.manual_seed(0)
    model = Model().double()
    settings = dict(lr=1e-3, rank=3, embedding_rank=3, order=2, embedding_order=2)
    comera.build(model, **settings)
    dense = comera.densify(model)
    ids, kept, random = torch.arange(60), copy.deepcopy(dense), copy.deepcopy(dense)
    assert sorted(comera.build(kept, init="svd", **settings).trains) == ["down", "embedding", "up"]
    comera.build(random, **settings)
    assert relative_error(kept(ids), dense(ids)) < 1e-10
    assert relative_error(random(ids), dense(ids)) > 0.5


def test_the_footprint_counts_what_there_is():
    toy = Toy()
    dense = sum(p.numel() for p in toy.model.parameters())
    toy.train(30, gamma=1.0, rank_lr=0.1, prune_every=1)
    print_of = comera.footprint(toy.model, toy.optimizer)
    numbers = sum(p.numel() for p in toy.model.parameters())
    moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes + 4 for s in toy.optimizer.state.values())
    assert print_of.numbers == numbers and print_of.dense_numbers == dense
    assert print_of.parameters == print_of.gradients == 8 * numbers and print_of.states == moments
    assert moments == 16 * numbers + 4 * len(list(toy.model.parameters()))  # torch's steps
    assert print_of.compression == dense / numbers > 1.6 and print_of.total == 16 * numbers + moments


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"late_after": 5}, "target_loss"),
        ({"late_after": 5, "target_loss": 1.0, "target_ratio": 1.5}, "cannot grow"),
        ({"penalty": "l2"}, "mean, size"),
        ({"init": "zero"}, "random, svd"),
        ({"rank": 0}, "rank"),
        ({"rank": 1000}, "no weight of this model becomes smaller"),
        ({"embedding_order": 1}, "embedding_order"),
    ],
)
def test_what_cannot_be_right_is_refused(settings, words):
    with pytest.raises(OptionError, match=words):
        Toy().build(**settings)


def test_a_comparison_trains_it_and_keeps_its_model_dense(tmp_path):
    options = {"lr": 1e-3, "rank": 3, "order": 2, "embedding_rank": 3, "embedding_order": 2, "prune_every": 1}
    optimizers = {
        "plain": {"optimizer": "CoMERA", "gamma": 0.0, **options},
        "smaller": {"optimizer": "CoMERA", "gamma": 10.0, "rank_lr": 0.6, **options},
    }
    plan = language_plan(tmp_path, optimizers=optimizers, seeds=[0])
    rows = [compare(run, plan.task, "cpu", tmp_path / run.setting.label) for run in plan.runs]
    dense = sum(p.numel() for p in plan.task.model(0).parameters())
    assert rows[1]["trained_parameters"] < rows[0]["trained_parameters"] < dense
    assert rows[0]["train_loss"][0] == rows[1]["train_loss"][0]  # the penalty is no part of what is reported
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert sum(p.numel() for p in model.parameters()) == dense
    tested = plan.task.evaluate(model, plan.task.held_out("test"), torch.device("cpu"))
    assert tested["loss"] == pytest.approx(rows[1]["test"]["loss"], rel=1e-4)
