"""docs/extending.md, "A backend", carried out: two ranks that hold half of every matrix equal one that holds it all."""

import threading

import torch
from torch import nn

from ds_mofa.options import Options
from ds_mofa.parameters import split_parameters
from ds_mofa.rules.mofasgd import MoFaSGDRule
from ds_mofa.step.backend import OneProcess
from ds_mofa.step.step import MatrixStep
from tests.extending.toy_backend import ThreadBackend, World

OPTIONS = Options(lr=0.02, adjust_lr_fn="adamw", rank=3, weight_decay=0.1)


def _model(weights=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9, bias=False), nn.Tanh(), nn.Linear(9, 5, bias=False)).double()
    for param, weight in zip(model.parameters(), weights or ()):
        param.data = weight
    return model


def _batch(step):
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def _train(model, backend, part, steps):
    split = split_parameters(model, model.parameters(), OPTIONS)
    step = MatrixStep(split.matrices, OPTIONS, MoFaSGDRule(OPTIONS), backend)
    for number in range(steps):
        model(_batch(number)[part]).square().sin().mean().backward()
        step.reduce()
        step.update(split.matrix_groups)
        backend.exchange.sum(torch.zeros(1))  # all halves are written before anyone reads
    return step.state_dict()


def _on_threads(steps, parts):
    weights, world = [param.data for param in _model().parameters()], World(2)
    ends, errors = [None, None], []

    def run(rank):
        try:
            ends[rank] = _train(_model(weights), ThreadBackend(world, rank), parts[rank], steps)
        except BaseException as error:
            errors.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return weights, ends


def test_two_ranks_of_halves_are_one_that_has_all():
    alone = _model()
    state = _train(alone, OneProcess(torch.device("cpu")), slice(None), 5)
    weights, (first, second) = _on_threads(5, [slice(0, 2), slice(2, 4)])
    for ours, theirs in zip(weights, alone.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    assert second == {} and first["matrices"].keys() == state["matrices"].keys()
    for name, one in first["matrices"].items():
        assert torch.allclose(one["sigma"], state["matrices"][name]["sigma"], rtol=1e-9)


def test_the_control_a_rank_of_other_data_is_seen():
    alone = _model()
    _train(alone, OneProcess(torch.device("cpu")), slice(None), 5)
    weights, _ = _on_threads(5, [slice(0, 2), slice(0, 2)])
    assert not any(torch.allclose(ours, theirs, rtol=1e-3) for ours, theirs in zip(weights, alone.parameters()))
