"""Capture: both ways fill Y = G V and Z = G^T U of the true gradient, and leave no gradient behind."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ds_mofa.capture.attach import attach
from ds_mofa.capture.queue import Queue
from ds_mofa.capture.sketch import Sketch
from ds_mofa.options import OptionError, Options
from ds_mofa.parameters import split_parameters
from tests.unit.capture.queues import QueueOnACPU
from tests.unit.dense_reference import relative_error

RANK = 3
MODES = pytest.mark.parametrize("mode", ["linear", "hook", "queued"])


class Captured:
    """A model with sketches attached, and an untouched copy of it whose gradients tell what they must be."""

    def __init__(self, model, mode, dtype=torch.float64, **options):
        self.model, self.plain = model.to(dtype), copy.deepcopy(model).to(dtype)
        options = {"include": getattr(model, "INCLUDE", []), **options}
        self.matrices = split_parameters(model, model.parameters(), Options(rank=RANK, **options)).matrices
        generator = torch.Generator().manual_seed(0)

        def draw(rows):
            return torch.randn(rows, RANK, generator=generator, dtype=torch.float64).to(dtype)

        sums = torch.float64 if dtype == torch.float64 else torch.float32
        self.sketches = [
            Sketch(torch.zeros(m, RANK, dtype=sums), torch.zeros(n, RANK, dtype=sums), draw(m), draw(n))
            for m, n in (matrix.shape for matrix in self.matrices)
        ]
        self.queue = QueueOnACPU(self.sketches) if mode == "queued" else None
        self.attachment = attach(self.matrices, self.sketches, "linear" if mode == "queued" else mode)

    def gradients(self):
        plain = dict(self.plain.named_parameters())
        return [plain[matrix.name].grad for matrix in self.matrices]

    def check(self, tolerance=1e-12, empty=()):
        """The sketches are those of the copy's gradients, the copy's other gradients are the model's."""
        for matrix, sketch, G in zip(self.matrices, self.sketches, self.gradients()):
            assert matrix.param.grad is None, matrix.name
            assert matrix.param.requires_grad
            if matrix.name in empty:
                assert not sketch.Y.any() and not sketch.Z.any(), matrix.name
                continue
            G = (G.to_dense() if G.is_sparse else G).double()
            assert G.norm() > 0, f"{matrix.name}: an empty gradient shows nothing"
            assert relative_error(sketch.Y, G @ sketch.V.double()) < tolerance, matrix.name
            assert relative_error(sketch.Z, G.mT @ sketch.U.double()) < tolerance, matrix.name
        names = {matrix.name for matrix in self.matrices}
        plain = dict(self.plain.named_parameters())
        for name, param in self.model.named_parameters():
            if name not in names and plain[name].grad is not None:
                assert relative_error(param.grad, plain[name].grad) < tolerance, name


class Products(TorchDispatchMode):
    """The shapes of all matrix products within."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append(tuple(out.shape))
        return out


def _inputs(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------- models, each with one difficulty


class Mlp(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 9, bias=bias), nn.LayerNorm(9), nn.Linear(9, 5, bias=bias)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.square = nn.Linear(6, 6)

    def forward(self, x):
        return self.square(torch.tanh(self.square(x)))


class SharedByModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class AlsoFunctional(nn.Module):
    """The weight is used by its module, by a matmul and by a penalty: G reaches it by three roads."""

    def __init__(self):
        super().__init__()
        self.square = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.square(x)) @ self.square.weight + 0.1 * self.square.weight.square().sum()


class FunctionalOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.square = nn.Linear(6, 6)

    def forward(self, x):
        return F.linear(x, self.square.weight, self.square.bias)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.outer, self.reentrant = Mlp(), nn.Linear(5, 5), reentrant

    def forward(self, x):
        if self.reentrant:  # which must see an input that wants a gradient
            x = x.requires_grad_()
        return self.outer(checkpoint(self.inner, x, use_reentrant=self.reentrant))


class OwnParameter(nn.Module):
    INCLUDE = ["^weight$"]

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(_inputs(6, 7, seed=1))
        self.experts = nn.Parameter(_inputs(2, 7, 5, seed=2))

    def forward(self, x):
        return x @ self.weight @ self.experts.sum(0)


class LinearOfItsOwnKind(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Concatenated(nn.Module):
    """The weights of two linears make one matrix, as in MobileBERT's head: neither forward is ever called."""

    def __init__(self):
        super().__init__()
        self.narrow, self.more = nn.Linear(3, 7), nn.Linear(7, 3, bias=False)

    def forward(self, x):
        return x @ torch.cat([self.narrow.weight.T, self.more.weight]) + self.narrow.bias


class Attention(nn.Module):
    """Its projections never go through a Linear's forward."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class HalfFrozenBias(Mlp):
    def __init__(self):
        super().__init__()
        self.up.bias.requires_grad_(False)


class Residual(nn.Module):
    """A weight used in many places of one graph, with views and broadcasts of its input."""

    def __init__(self):
        super().__init__()
        self.square = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return x + self.square(x.transpose(0, 1)).transpose(0, 1) + self.square(x[:, :1].expand_as(x))


class Recurrent(nn.Module):
    """Linears that are used again and again in one forward, as ALBERT's layers are."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        for _ in range(5):
            x = x + torch.tanh(self.inner(x))
        x = self.outer(x)
        return x + torch.tanh(self.inner(x))


MODELS = {
    "biases": Mlp,
    "no biases": lambda: Mlp(bias=False),
    "used twice": UsedTwice,
    "shared by two modules": SharedByModules,
    "also used functionally": AlsoFunctional,
    "functionally only": FunctionalOnly,
    "checkpointed, reentrant": lambda: Checkpointed(True),
    "checkpointed, not reentrant": lambda: Checkpointed(False),
    "a parameter of its own": OwnParameter,
    "subclass of Linear": lambda: nn.Sequential(LinearOfItsOwnKind(6, 7), nn.Linear(7, 5)),
    "two weights that make one": Concatenated,
    "Conv1D": lambda: nn.Sequential(Conv1D(7, 6), nn.Linear(7, 5)),
    "attention": Attention,
    "frozen bias": HalfFrozenBias,
    "strided inputs": Residual,
    "recurrent": Recurrent,
}
MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def _build(model):
    torch.manual_seed(0)
    return model()


def _backward(captured, x, **kwargs):
    for model in (captured.model, captured.plain):
        model(x.clone(), **kwargs).square().sum().backward()


@MODES
@MODEL
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_sketches_are_those_of_the_summed_gradient(model, mode, micro_batches):
    captured = Captured(_build(model), mode)
    for i in range(micro_batches):
        _backward(captured, _inputs(4, 5, 6, seed=i))
    captured.check()


@MODES
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)])
def test_inputs_of_any_number_of_dimensions(shape, mode):
    captured = Captured(_build(Mlp), mode)
    _backward(captured, _inputs(*shape))
    if 0 in shape:  # no token, no gradient
        assert not any(sketch.Y.any() or sketch.Z.any() for sketch in captured.sketches)
    else:
        captured.check()


@MODES
@MODEL
def test_outputs_and_input_gradients_are_the_plain_model_s(model, mode):
    captured = Captured(_build(model), mode)
    results = []
    for module in (captured.model, captured.plain):
        x = _inputs(4, 5, 6).requires_grad_()
        y = module(x * 1)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert relative_error(results[0][1], results[1][1]) < 1e-14


@MODES
def test_the_sum_over_micro_batches_is_the_sketch_of_the_whole_batch(mode):
    whole, parts = Captured(_build(Mlp), mode), Captured(_build(Mlp), mode)
    x = _inputs(12, 6)
    _backward(whole, x)
    for part in x.split([1, 4, 7]):
        _backward(parts, part)
    for one, other in zip(whole.sketches, parts.sketches):
        assert relative_error(other.Y, one.Y) < 1e-13
        assert relative_error(other.Z, one.Z) < 1e-13


@MODES
def test_sketches_are_linear_in_the_loss(mode):
    """Of a a and b b they are a times those of a plus b times those of b: that is why they add up over ranks."""

    def taken(factors):
        captured = Captured(_build(Mlp), mode)
        for seed, factor in factors.items():
            (factor * captured.model(_inputs(7, 6, seed=seed)).square().sum()).backward()
        return torch.cat([part.flatten() for sketch in captured.sketches for part in (sketch.Y, sketch.Z)])

    combined = 2.5 * taken({1: 1.0}) - 0.75 * taken({2: 1.0})
    assert relative_error(taken({1: 2.5, 2: -0.75}), combined) < 1e-12


@MODES
def test_evaluation_adds_nothing(mode):
    captured = Captured(_build(Mlp), mode)
    x = _inputs(4, 6)
    with torch.no_grad():
        assert torch.equal(captured.model(x), captured.plain(x))
    with torch.inference_mode():
        captured.model(x)
    captured.model(x)  # a forward whose backward never comes
    assert not any(sketch.Y.any() or sketch.Z.any() for sketch in captured.sketches)


@MODES
def test_a_module_unused_in_a_step_adds_nothing(mode):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, idle=False):
            return self.idle(x) if idle else self.used(x)

    captured = Captured(_build(Gated), mode)
    _backward(captured, _inputs(4, 6))
    captured.check(empty=["idle.weight"])
    _backward(captured, _inputs(4, 6, seed=1), idle=True)
    captured.check()


@MODES
def test_an_input_that_wants_no_gradient_gets_none(mode):
    captured = Captured(_build(Mlp), mode)
    x = _inputs(4, 6)
    _backward(captured, x)
    captured.check()
    assert x.grad is None


@MODES
def test_a_weight_frozen_later_adds_nothing(mode):
    captured = Captured(_build(Mlp), mode)
    for model in (captured.model, captured.plain):
        model.up.weight.requires_grad_(False)
    _backward(captured, _inputs(4, 6))
    assert not captured.sketches[0].Y.any() and captured.sketches[1].Y.any()


@MODES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_weight_frozen_between_forward_and_backward_adds_nothing(mode, compiled):
    captured = Captured(_build(Mlp), mode)
    sketches = []
    for model in (captured.model, captured.plain):
        if compiled:
            model.compile(backend="aot_eager")
        loss = model(_inputs(4, 6)).square().sum()
        model.up.weight.requires_grad_(False)
        loss.backward()
        sketches = sketches or [sketch.Y.any() for sketch in captured.sketches]
    assert captured.plain.up.weight.grad is None and captured.plain.down.weight.grad is not None
    assert sketches == [False, True]


@MODES
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast_takes_the_sketches_of_the_gradient_that_autocast_gives(mode, inside):
    captured = Captured(_build(Mlp), mode, dtype=torch.float32)
    for model in (captured.model, captured.plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(_inputs(64, 6, dtype=torch.float32)).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    captured.check(tolerance=1e-2)  # bf16 rounds each factor of a product to 2^-9


def test_under_autocast_both_captures_agree():
    sketches = {}
    for mode in ("linear", "hook"):
        captured = Captured(_build(Mlp), mode, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = captured.model(_inputs(64, 6, dtype=torch.float32)).float().square().sum()
        loss.backward()
        sketches[mode] = captured.sketches
        dtypes = {param.grad.dtype for param in captured.model.parameters() if param.grad is not None}
        assert dtypes == {torch.float32}
    for one, other in zip(sketches["linear"], sketches["hook"]):
        assert one.Y.dtype == torch.float32
        assert relative_error(one.Y, other.Y) < 1e-2
        assert relative_error(one.Z, other.Z) < 1e-2


def test_under_autocast_the_output_is_the_plain_model_s():
    captured = Captured(_build(Mlp), "linear", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = _inputs(8, 6, dtype=torch.float32)
        mine, plain = captured.model(x), captured.plain(x)
    assert mine.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(mine, plain)


@MODES
def test_a_bf16_model_is_sketched_in_fp32_sums(mode):
    captured = Captured(_build(Mlp), mode, dtype=torch.bfloat16)
    for i in range(3):
        _backward(captured, _inputs(32, 6, seed=i, dtype=torch.bfloat16))
    assert captured.sketches[0].Y.dtype == torch.float32
    captured.check(tolerance=2e-2)


@MODES
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_an_included_embedding_is_sketched(sparse, mode):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(11, 6, sparse=sparse), nn.Linear(6, 5)

        def forward(self, tokens):
            return self.out(self.words(tokens))

    captured = Captured(_build(Reader), mode, include=["words"])
    assert [matrix.name for matrix in captured.matrices] == ["words.weight", "out.weight"]
    for seed in range(2):
        tokens = torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(seed))
        _backward(captured, tokens)
    captured.check()


# The debugging backend "eager" keeps a checkpointed region's inputs, sketches among them, by version, and then
# refuses any that has been added to. AOTAutograd, which real backends are built on, does not.
COMPILED = [("aot_eager", name, mode) for name in MODELS for mode in ("linear", "hook", "queued")]
COMPILED += [("eager", name, mode) for name in MODELS if "checkpointed" not in name for mode in ("linear", "hook")]


@pytest.mark.parametrize("backend, name, mode", COMPILED)
def test_a_compiled_model_fills_the_same_sketches(backend, name, mode):
    captured = Captured(_build(MODELS[name]), mode)
    torch._dynamo.reset()
    compiled = torch.compile(captured.model, backend=backend)
    for seed in range(2):
        x = _inputs(4, 5, 6, seed=seed)
        compiled(x.clone()).square().sum().backward()
        captured.plain(x.clone()).square().sum().backward()
    captured.check()


@MODES
def test_all_that_is_no_matrix_keeps_its_gradient(mode):
    captured = Captured(_build(Mlp), mode)
    _backward(captured, _inputs(4, 6))
    matrices = {matrix.name for matrix in captured.matrices}
    for name, param in captured.model.named_parameters():
        assert (param.grad is None) == (name in matrices), name


@pytest.mark.parametrize("model", ["biases", "used twice", "shared by two modules", "checkpointed, not reentrant"])
def test_the_linear_never_computes_the_weight_gradient(model):
    captured, plain = Captured(_build(MODELS[model]), "linear"), _build(MODELS[model]).double()
    shapes = [matrix.shape for matrix in captured.matrices]

    def products(some):
        with Products() as seen, torch.autograd.set_multithreading_enabled(False):
            some(_inputs(7, 6)).square().sum().backward()
        return sum(seen.shapes.count(shape) for shape in set(shapes))

    assert products(captured.model) == 0
    assert products(plain) >= len(shapes)
    assert all(sketch.Y.any() for sketch in captured.sketches)


def test_the_hook_frees_each_gradient_before_the_next_is_there():
    model = _build(lambda: nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)]))
    captured = Captured(model, "hook")
    alive = []
    for matrix in captured.matrices:
        matrix.param.register_hook(lambda grad: alive.append(sum(m.param.grad is not None for m in captured.matrices)))
    captured.model(_inputs(4, 6)).square().sum().backward()
    assert alive == [0] * 5


@MODES
@MODEL
def test_remove_puts_the_model_back(model, mode):
    captured = Captured(_build(model), mode)
    attributes = [set(vars(module)) for module in captured.plain.modules()]
    _backward(captured, _inputs(4, 5, 6))
    before = [sketch.Y.clone() for sketch in captured.sketches]
    captured.attachment.remove()
    captured.attachment.remove()  # twice does no harm
    assert [set(vars(module)) for module in captured.model.modules()] == attributes
    captured.model.zero_grad()
    captured.plain.zero_grad()
    _backward(captured, _inputs(4, 5, 6))
    assert all(map(torch.equal, (sketch.Y for sketch in captured.sketches), before))
    for (name, mine), plain in zip(captured.model.named_parameters(), captured.plain.parameters()):
        if plain.requires_grad:
            assert torch.equal(mine.grad, plain.grad), name


@MODES
def test_a_copy_of_an_attached_model_is_a_plain_model(mode):
    """An exponential average or a reference model is made this way: its backwards are none of the optimizer's."""
    captured = Captured(_build(Mlp), mode)
    duplicate = copy.deepcopy(captured.model)
    x = _inputs(4, 6)
    assert torch.equal(duplicate(x), captured.model(x))
    with torch.no_grad():
        captured.model.up.weight.mul_(2)  # the copy has weights of its own
    assert torch.equal(duplicate(x), captured.plain(x))

    for model in (duplicate, captured.plain):
        model(x).square().sum().backward()
    for mine, plain in zip(duplicate.parameters(), captured.plain.parameters()):
        assert torch.equal(mine.grad, plain.grad)
    assert not any(sketch.Y.any() or sketch.Z.any() for sketch in captured.sketches)


@MODES
def test_state_dict_and_names_do_not_change(mode):
    captured = Captured(_build(Mlp), mode)
    mine, plain = captured.model.state_dict(), captured.plain.state_dict()
    assert list(mine) == list(plain) and all(torch.equal(mine[key], plain[key]) for key in mine)
    assert [n for n, _ in captured.model.named_modules()] == [n for n, _ in captured.plain.named_modules()]


@MODES
def test_forward_and_backward_hooks_of_the_user_still_run(mode):
    captured = Captured(_build(Mlp), mode)
    seen = []
    captured.model.up.register_forward_pre_hook(lambda *_: seen.append("before"))
    captured.model.up.register_forward_hook(lambda *_: seen.append("after"))
    captured.model.up.register_full_backward_hook(lambda *_: seen.append("backward"))
    _backward(captured, _inputs(4, 6).requires_grad_())
    assert seen == ["before", "after", "backward"]
    captured.check()


@MODES
def test_second_derivatives_are_refused_or_right(mode):
    captured = Captured(_build(Mlp), mode)
    x = _inputs(4, 6).requires_grad_()
    loss = captured.model(x).square().sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    if mode != "hook":
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.square().sum().backward()
        return
    slope.square().sum().backward()
    (plain,) = torch.autograd.grad(captured.plain(x).square().sum(), x, create_graph=True)
    plain.square().sum().backward()
    captured.check()


@MODES
def test_nothing_keeps_the_activations_of_a_finished_step(mode):
    captured = Captured(_build(Mlp), mode)
    captured.model(_inputs(4, 999, 6)).square().sum().backward()
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is torch.Tensor and 999 in o.shape]


def test_a_forward_that_somebody_else_has_replaced_is_not_undone_in_silence():
    model = nn.Sequential(nn.Linear(6, 5))
    matrices = split_parameters(model, model.parameters(), Options(rank=RANK)).matrices
    model[0].forward = lambda x: 2 * nn.Linear.forward(model[0], x)
    sketches = [Sketch(torch.zeros(5, RANK), torch.zeros(6, RANK), torch.randn(5, RANK), torch.randn(6, RANK))]
    with pytest.raises(OptionError, match='replaced by .*lambda.*set capture to "hook"'):
        attach(matrices, sketches, "linear")
    attach(matrices, sketches, "hook")
    model(torch.randn(4, 6)).sum().backward()
    assert sketches[0].Y.any() and model[0].weight.grad is None


def test_taking_an_earlier_attachment_off_leaves_a_later_one_on():
    model = nn.Sequential(nn.Linear(6, 5))
    matrices = split_parameters(model, model.parameters(), Options(rank=RANK)).matrices
    earlier, later = (
        [Sketch(torch.zeros(5, RANK), torch.zeros(6, RANK), torch.randn(5, RANK), torch.randn(6, RANK))] for _ in "ab"
    )
    first = attach(matrices, earlier, "linear")
    second = attach(matrices, later, "linear")
    first.remove()
    model(torch.randn(4, 6)).sum().backward()
    assert later[0].Y.any() and not earlier[0].Y.any() and "forward" in vars(model[0])
    second.remove()
    assert "forward" not in vars(model[0])


def test_a_linear_without_tokens_does_not_wait():
    queue = Queue(2, torch.bfloat16)
    queue.add((0, 0, 0, 0), torch.empty(0, 6), torch.empty(0, 5))
    queue.flush()
    assert not queue._waiting


def test_no_two_uses_of_a_linear_are_in_one_launch():
    """Both would add to the same old sum."""
    captured = Captured(_build(Recurrent), "queued")
    _backward(captured, _inputs(4, 6))
    captured.check()
    sizes = captured.queue.sizes
    assert sum(sizes) == 7 and max(sizes) == 2


def test_nor_are_two_that_are_taken_at_once():
    """As compiled code does; one without tokens is in none."""
    captured = Captured(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), "queued")
    first, second = captured.sketches
    x, dy, none = _inputs(4, 6), _inputs(4, 6, seed=1), _inputs(0, 6)
    captured.queue.take(
        [(first.addresses, x, dy), (second.addresses, x, dy), (second.addresses, none, none), (first.addresses, dy, x)]
    )
    assert captured.queue.sizes == [2, 1] and not captured.queue._waiting
    for sketch, G in ((first, dy.mT @ x + x.mT @ dy), (second, dy.mT @ x)):
        assert relative_error(sketch.Y, G @ sketch.V) < 1e-12 and relative_error(sketch.Z, G.mT @ sketch.U) < 1e-12
