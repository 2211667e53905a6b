"""Embeddings as matrices: the same training as with dense gradients, and rows that never came stay as they are."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_mofa import GaLore, MoFaSGD
from tests.reference import Reference
from tests.unit.dense_reference import relative_error

VOCABULARY, WIDTH, PAD = 200, 24, 1
MATRICES = ["embed.weight", "mix.weight"]


class Model(nn.Module):
    """``late``: the embedding has no gradient yet."""

    def __init__(self):
        super().__init__()
        self.late = False
        self.embed, self.mix = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PAD), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens[:, :-1])
        logits = self.head(torch.tanh(self.mix(x.detach() if self.late else x)))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return Model().to(dtype)


def batches(steps):
    """More tokens come from step to step, but never those from 60 + steps on."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(PAD, 60 + step, (4, 16), generator=generator) for step in range(steps)]


def moved(optimizer_class, dtype, **options):
    """(rows that never had a gradient, the others): how many of them have moved, of how many."""
    net = model(dtype)
    before = net.embed.weight.detach().clone()
    settings = {"lr": 2e-3, "rank": 8, "include": ["embed"], **options}
    optimizer = optimizer_class(net, **settings)
    came = torch.zeros(VOCABULARY, dtype=torch.bool)
    for tokens in batches(30):
        came[tokens[:, :-1].flatten()] = True
        net(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    came[PAD] = False
    different = (net.embed.weight.detach() != before).any(1)
    return [(int(different[rows].sum()), int(rows.sum())) for rows in (~came, came)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 16}, {"explore": 4, "balance": 0.5}, {"capture": "hook"}, {"optimizer_class": GaLore}],
    ids=["plain", "rank 16", "explored", "hook", "GaLore"],
)
def test_rows_that_never_came_stay_bit_for_bit(options, dtype):
    (still, others), (live, came) = moved(**{"optimizer_class": MoFaSGD, "dtype": dtype, **options})
    assert still == 0 and others > 100
    assert live == came > 80


@pytest.mark.parametrize("what", ["the basis's", "the explored"])
def test_columns_on_all_rows_would_move_them(what):
    """The control."""
    place, options = {
        "the basis's": ("ds_mofa.linalg.factors.live_rows", {}),
        "the explored": ("ds_mofa.rules.exploration.seen_rows", {"explore": 4}),
    }[what]
    everywhere = mock.patch(place, lambda view, *_: torch.ones_like(view[..., :1]))
    with everywhere:
        (still, others), _ = moved(MoFaSGD, torch.float32, **options)
    assert still == others > 100


@pytest.mark.parametrize("options", [{}, {"explore": 3}], ids=["plain", "explored"])
def test_training_equals_the_dense_reference(options):
    settings = {"lr": 2e-3, "rank": 5, "weight_decay": 0.1, **options}
    net = model()
    reference = Reference(copy.deepcopy(net), MATRICES, beta=0.85, adamw_eps=1e-6, **settings)
    optimizer = MoFaSGD(net, include=["embed"], adamw_eps=1e-6, **settings)
    for tokens in batches(6):
        for half in tokens.chunk(2):
            (net(half) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step((tokens,))
    for name, wanted in reference.weights().items():
        assert relative_error(net.get_parameter(name), wanted) < 1e-5, name
    momentum = reference.momenta["embed.weight"].M
    U, sigma, V = (
        optimizer.named_state_dict()["mofasgd"]["matrices"]["embed.weight"][key] for key in ("U", "sigma", "V")
    )
    assert relative_error(U * sigma @ V.mT, momentum) < 1e-4


@pytest.mark.parametrize("options", [{}, {"explore": 3}], ids=["plain", "explored"])
def test_a_first_gradient_that_comes_late_is_met_by_random_directions_over_all_rows(options):
    settings = {"lr": 2e-3, "rank": 5, **options}
    net = model()
    reference = Reference(copy.deepcopy(net), MATRICES, beta=0.85, adamw_eps=1e-6, **settings)
    optimizer = MoFaSGD(net, include=["embed"], adamw_eps=1e-6, **settings)
    for step, tokens in enumerate(batches(4)):
        for some in (net, reference.model):
            some.late = step == 0
        net(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step((tokens,))
    for name, wanted in reference.weights().items():
        assert relative_error(net.get_parameter(name), wanted) < 1e-5, name


def test_weight_decay_is_of_every_row():
    """As under AdamW: it is of the weights, and asks for no gradient."""
    net = model()
    before = net.embed.weight.detach().clone()
    optimizer = MoFaSGD(net, lr=2e-3, rank=8, include=["embed"], weight_decay=0.1)
    net(batches(1)[0]).backward()
    optimizer.step()
    assert torch.allclose(net.embed.weight[100:], before[100:] * (1 - 2e-4), rtol=1e-6)
