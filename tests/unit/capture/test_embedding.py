"""The capture of embeddings: the sketches of the gradient that autograd computes, and no gradient."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MBartConfig, MBartForConditionalGeneration

from ds_mofa import MoFaSGD
from ds_mofa.capture.attach import attach
from ds_mofa.capture.sketch import Sketch
from ds_mofa.options import OptionError, Options
from ds_mofa.parameters import split_parameters
from tests.unit.dense_reference import relative_error

VOCABULARY, WIDTH, RANK = 50, 12, 4
KINDS = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "by frequency": {"scale_grad_by_freq": True},
    "both": {"padding_idx": 3, "scale_grad_by_freq": True},
}


class Scaled(nn.Embedding):
    """As Gemma's, mBART's and others': by the forward of the class below."""

    def forward(self, input_ids):
        return super().forward(input_ids) * 3.0


class Learned(nn.Embedding):
    """As OPT's and BART's positions: the ids are made of what is given, by a name of its own."""

    def forward(self, tokens, *, offset=0):
        return super().forward((tokens + offset) % VOCABULARY)


class OnItsOwn(nn.Embedding):
    """Does not call the forward of the class below."""

    def forward(self, input_ids):
        return F.embedding(input_ids, self.weight) + self.weight[0]


class Model(nn.Module):
    def __init__(self, kind=nn.Embedding, tied=False, **settings):
        super().__init__()
        self.embed, self.mix = kind(VOCABULARY, WIDTH, **settings), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids)))).float().square().mean()


def ids(seed, *shape):
    return torch.randint(30, shape or (3, 16), generator=torch.Generator().manual_seed(seed))


def captured(model, mode="linear"):
    """A copy that nothing is attached to, and the sketches of the embedding of this one."""
    plain = copy.deepcopy(model)
    divided = split_parameters(model, model.parameters(), Options(rank=RANK, include=("embed",)))
    matrices = [matrix for matrix in divided.matrices if matrix.name == "embed.weight"]
    dtype = model.embed.weight.dtype
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    sums = [torch.zeros(rows, RANK, dtype=wide) for rows in (VOCABULARY, WIDTH)]
    draws = [torch.randn(rows, RANK, generator=generator).to(dtype) for rows in (VOCABULARY, WIDTH)]
    sketch = Sketch(*sums, *draws)
    return plain, sketch, attach(matrices, [sketch], mode)


def check(sketch, plain, tolerance):
    G = plain.embed.weight.grad
    G = (G.to_dense() if G.is_sparse else G).double()
    assert G.norm() > 0
    assert relative_error(sketch.Y, G @ sketch.V.double()) < tolerance
    assert relative_error(sketch.Z, G.mT @ sketch.U.double()) < tolerance
    assert torch.equal(sketch.Y.any(1), G.any(1)), "a row without a gradient is not zero"


@pytest.fixture
def no_gradients(monkeypatch):
    """An embedding's gradient that autograd has formed is an error."""
    monkeypatch.setattr(Sketch, "add_gradient", None)


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("tied", [False, True], ids=["alone", "tied"])
@pytest.mark.parametrize("settings", [*KINDS.values(), {"sparse": True}], ids=[*KINDS, "sparse"])
@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_the_sketches_are_those_of_autograd_s_gradient(kind, settings, tied, dtype, tolerance):
    model = Model(kind, tied, **settings).to(dtype)
    plain, sketch, _ = captured(model)
    for seed in range(3):
        for some in (model, plain):
            some(ids(seed)).backward()
    assert model.embed.weight.grad is None
    check(sketch, plain, tolerance)
    assert relative_error(model.mix.weight.grad, plain.mix.weight.grad) < tolerance


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("name", ["padding", "by frequency"])
def test_what_torch_leaves_out_or_divides_would_be_seen(name, monkeypatch):
    """The control."""
    monkeypatch.setattr("ds_mofa.capture.embedding._counted", lambda ctx, ids, dy: dy)
    model = Model(**KINDS[name])
    plain, sketch, _ = captured(model)
    for some in (model, plain):
        some(ids(0)).backward()
    with pytest.raises(AssertionError):
        check(sketch, plain, 1e-2)


def _grad_of_the_head(model):
    """Asks for another gradient first, which must leave nothing behind."""
    torch.autograd.grad(model(ids(8)), model.head.weight)
    return model(ids(0))


def _checkpointed(model, reentrant):
    x = torch.ones((), requires_grad=True, dtype=model.embed.weight.dtype)
    return checkpoint(lambda x, some: x * model(some), x, ids(0), use_reentrant=reentrant)


def _autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        return model.embed(ids(0)).float().square().sum()


def _vmapped(model):
    return torch.vmap(model.embed)(ids(0)).square().sum()


ROADS = {
    "no tokens besides": lambda model: model(ids(0)) + model.embed(ids(0)[:0]).sum(),
    "one token": lambda model: model(ids(0)[0, 0]),
    "int32": lambda model: model(ids(0).int()),
    "used twice": lambda model: model(ids(0)) + model(ids(1)),
    "after another's gradient": _grad_of_the_head,
    "checkpointed": functools.partial(_checkpointed, reentrant=False),
    "checkpointed, reentrant": functools.partial(_checkpointed, reentrant=True),
    "autocast": _autocast,
    "an expanded output gradient": lambda model: model.embed(ids(0)).sum(),
}
BY_HOOK = {
    "by F.embedding as well": lambda model: model(ids(0)) + F.embedding(ids(1), model.embed.weight).square().sum(),
    "a penalty": lambda model: model(ids(0)) + model.embed.weight.square().sum(),
    "under vmap": _vmapped,
}


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("road", [*ROADS, *BY_HOOK])
def test_every_road(road, kind, monkeypatch):
    if road in ROADS:
        monkeypatch.setattr(Sketch, "add_gradient", None)
    torch.manual_seed(0)
    model = Model(kind, padding_idx=3)
    plain, sketch, _ = captured(model)
    for some in (model, plain):
        (ROADS | BY_HOOK)[road](some).backward()
    check(sketch, plain, 1e-6)


@pytest.mark.parametrize("kind", [Learned, OnItsOwn])
def test_other_subclasses(kind, monkeypatch):
    """One that calls the forward below without a gradient, one that does not by the hook."""
    if kind is Learned:
        monkeypatch.setattr(Sketch, "add_gradient", None)
    model = Model(kind)
    plain, sketch, _ = captured(model)
    more = {"offset": 7} if kind is Learned else {}
    for some in (model, plain):
        some.head(some.embed(ids(0), **more)).square().mean().backward()
    check(sketch, plain, 1e-6)


def test_an_embedding_bag_goes_by_the_hook():
    model = Model(nn.EmbeddingBag)
    plain, sketch, _ = captured(model)
    for some in (model, plain):
        some(ids(0)).backward()
    assert model.embed.weight.grad is None
    check(sketch, plain, 1e-6)


def _gemma():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=64, head_dim=16, num_key_value_heads=1, **shape))


def _mbart():
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in SIDE.items()}
    settings = {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 20, "scale_embedding": True, **sides}
    return MBartForConditionalGeneration(MBartConfig(**settings)).eval()  # no dropout


SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 48}


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("build", [_gemma, _mbart])
def test_models_of_transformers_that_scale_their_embedding(build):
    """Tied to the head, and mBART's learned positions too: no gradient of any embedding is formed."""
    torch.manual_seed(0)
    model = build()
    plain = copy.deepcopy(model)
    optimizer = MoFaSGD(model, rank=RANK, include=[r"embed_tokens|embed_positions|shared"])
    for some in (model, plain):
        tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
        some(input_ids=tokens, labels=tokens).loss.backward()
    found = 0
    for matrix, sketch in zip(optimizer.split.matrices, optimizer.matrices.captured, strict=True):
        if any(isinstance(module, nn.Embedding) for module in matrix.modules):
            G = plain.get_parameter(matrix.name).grad
            assert relative_error(sketch.Y, G @ sketch.V) < 1e-5
            assert relative_error(sketch.Z, G.mT @ sketch.U) < 1e-5
            found += 1
    assert found == (1 if build is _gemma else 3)


def test_nan_in_the_padding_goes_nowhere():
    model = Model(padding_idx=3)
    plain, sketch, _ = captured(model)
    for some in (model, plain):
        out = some.embed(ids(0))
        out.backward(torch.where((ids(0) == 3).unsqueeze(-1), torch.nan, 1.0).expand_as(out))
    check(sketch, plain, 1e-6)


def test_autograd_grad_of_the_weight_is_the_gradient():
    for settings in (*KINDS.values(), {"sparse": True}):
        model = Model(**settings)
        plain, sketch, _ = captured(model)
        got, wanted = (torch.autograd.grad(some(ids(0)), some.embed.weight)[0] for some in (model, plain))
        assert got.is_sparse == wanted.is_sparse
        assert relative_error(*(one.to_dense() if one.is_sparse else one for one in (got, wanted))) < 1e-6
        assert not sketch.Y.any()


def test_a_hook_on_the_weight_sees_the_gradient_and_counts():
    model = Model(padding_idx=3)
    plain, sketch, _ = captured(model)
    for some in (model, plain):
        some.embed.weight.register_hook(lambda grad: 2 * grad)
        some(ids(0)).backward()
    check(sketch, plain, 1e-6)


def test_no_gradient_no_copy_and_no_substitute_is_sketched():
    model = Model(Scaled)
    _, sketch, attachment = captured(model)
    other = {"embed.weight": model.embed.weight.detach().clone().requires_grad_()}
    torch.func.functional_call(model, other, (ids(0),)).backward()
    assert other["embed.weight"].grad is not None
    twin = copy.deepcopy(model)
    twin(ids(0)).backward()
    assert twin.embed.weight.grad is not None
    with torch.no_grad():
        model(ids(0))
    assert not sketch.Y.any() and not sketch.Z.any()
    attachment.remove()
    assert "forward" not in vars(model.embed)
    model(ids(0)).backward()
    assert model.embed.weight.grad is not None


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_compiled(kind, monkeypatch):
    """A plain one is sketched by an operator, a subclass's by the hook."""
    if kind is nn.Embedding:
        monkeypatch.setattr(Sketch, "add_gradient", None)
    torch._dynamo.reset()
    model = Model(kind, **KINDS["both"])
    plain, sketch, _ = captured(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        compiled(ids(seed)).backward()
        plain(ids(seed)).backward()
    check(sketch, plain, 1e-6)


def test_backward_keeps_the_ids_alone():
    model = Model()
    captured(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model.embed(ids(0))
    assert [one.dtype for one in kept] == [torch.int64]


def test_rows_that_are_shortened_in_the_forward_are_refused():
    model = Model(max_norm=1.0)
    with pytest.raises(OptionError, match="max_norm"):
        captured(model)


def test_a_forward_of_somebody_else_s_is_refused():
    model = Model()
    model.embed.forward = lambda ids: torch.zeros(1)
    with pytest.raises(OptionError, match="has been replaced"):
        captured(model)
