"""Every ZeRO stage, world size, micro-batching and capture trains like one process with dense float64 matrices."""

import functools

import deepspeed
import pytest
import torch
from launching import on_ranks
from torch import nn
from toys import Sliver, Toy, batches
from training import OPTIONS, config, toy, train

from reference import Reference

STEPS = 5
TOLERANCE = 1e-5


def fp32(stage: int, micro: int, capture: str) -> dict:
    return train(config(stage, micro=micro, options={"capture": capture}), STEPS)


def built_in_shards() -> dict:
    settings = config(3)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = Toy()
    assert model.up.weight.shape == (0,), "zero.Init has not partitioned it"
    return train(settings, STEPS, model=model)


def slivers(stage: int) -> dict:
    return train(config(stage, options={"rank": 2}), STEPS, model=toy(Sliver), look=shards)


def shards(engine) -> dict[str, int]:
    """Elements of each stage-3 parameter that lie on this rank, without the padding."""
    ends = {}
    for name, param in engine.module.named_parameters():
        if hasattr(param, "ds_tensor"):
            left = param.ds_numel - deepspeed.comm.get_rank() * param.ds_tensor.ds_numel
            ends[name] = max(0, min(left, param.ds_tensor.ds_numel))
    return ends


def bf16(stage: int) -> dict:
    return train(config(stage, dtype="bf16"), 20)


@functools.cache
def dense(model: type[nn.Module] = Toy, rank: int = OPTIONS["rank"], beta: float = 0.85, frozen: bool = False) -> dict:
    built, matrices = toy(model), model.MATRICES
    if frozen:
        for name in matrices:
            built.get_parameter(name).requires_grad_(False)
    settings = {key: OPTIONS[key] for key in ("lr", "weight_decay", "adamw_eps")}
    reference = Reference(built, [] if frozen else matrices, rank=rank, beta=beta, **settings)
    *data, last = batches(STEPS + 1)
    losses = [reference.step(batch) for batch in data]
    momenta = {name: momentum.M for name, momentum in reference.momenta.items()}
    return {"losses": [*losses, reference.loss(last)], "weights": reference.weights(), "momenta": momenta}


def distances(result: dict, wanted: dict) -> dict[str, float]:
    """Largest relative difference of the losses, and of the weights and of the momenta in Frobenius norm."""
    far = {"losses": max(abs(x - y) / y for x, y in zip(result["losses"], wanted["losses"], strict=True))}
    for kind in ("weights", "momenta"):
        pairs = [(result[kind][name].double(), value) for name, value in wanted[kind].items() if result[kind]]
        far[kind] = max([float((x - y).norm() / y.norm()) for x, y in pairs], default=0.0)
    return far


def assert_same(ran, wanted: dict) -> None:
    assert ran.ranks[0]["momenta"].keys() == wanted["momenta"].keys()
    for result in ran.ranks:
        assert result["weights"].keys() == wanted["weights"].keys()
        far = distances(result, wanted)
        assert max(far.values()) < TOLERANCE, far


@on_ranks(fp32, world=[1, 2, 3], stage=[0, 1, 2, 3], micro=[1, 3], capture=["linear", "hook"])
def test_agrees_with_the_dense_reference(ran):
    assert_same(ran, dense())


@on_ranks(built_in_shards, world=[1, 2, 3])
def test_a_model_built_under_zero_init_agrees(ran):
    assert_same(ran, dense())


@on_ranks(slivers, world=[3], stage=[0, 1, 2, 3])
def test_agrees_where_a_rank_holds_nothing_of_a_matrix(ran):
    assert_same(ran, dense(Sliver, rank=2))
    if ran.stage == 3:
        held = [result["seen"]["sliver.weight"] for result in ran.ranks]
        assert held == [2, 2, 0]
        rows = [result["seen"]["up.weight"] / 35 for result in ran.ranks]
        assert any(row % 1 for row in rows), "no shard ends inside a row"


@on_ranks(bf16, world=[2, 3], stage=[0, 1, 2, 3])
def test_bf16_replicas_are_bitwise_equal_after_20_steps(ran):
    first, *others = ran.ranks
    assert first["losses"][-1] < first["losses"][0] - 0.5
    for other in others:
        for name, weight in first["weights"].items():
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, other["weights"][name]), name


@pytest.mark.parametrize("wrong", [{"beta": 0.9}, {"frozen": True}, {"rank": 3}], ids=str)
def test_a_wrong_run_would_be_far_outside_the_tolerance(wrong):
    """The control: what the tests above compare does tell a slightly different optimizer apart."""
    far = distances(dense(**wrong), dense() if "frozen" not in wrong else {**dense(), "momenta": {}})
    assert far["losses"] > 10 * TOLERANCE and far["weights"] > 10 * TOLERANCE, far


def test_the_reference_moves_all_that_is_trained_and_nothing_else():
    start, end = toy().state_dict(), dense()["weights"]
    moved = {name for name in end if (end[name] - start[name]).norm() > 1e-3 * (1 + start[name].norm())}
    assert moved == set(end) - {"frozen.weight"}
    assert set(Toy.MATRICES) <= moved
