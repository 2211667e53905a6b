"""Gradients dropped between backward and step: the matrices forget a batch where AdamW's part does, and only there."""

import functools

import deepspeed
import torch
from deepspeed import comm as dist
from launching import on_ranks
from toys import Toy, batches, micro_batches
from training import config, engine_for, toy, whole_weights

CALLS = ["engine", "model", "optimizer"]


def train(stage: int, micro: int, capture: str, adamw: bool, call: str | None, skipped: bool = False) -> dict:
    """Backward on a bad micro-batch, ``call``, and, of two micro-batches, the backward on a good one; then the step.

    Args:
        adamw: AdamW alone, as DeepSpeed does it.
        skipped: the bad one never came (in its place, a loss of zero).
    """
    settings = config(stage, micro=micro, options={"capture": capture, "weight_decay": 0.0})
    if adamw:
        settings["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "eps": 1e-6}}
    model = toy()
    rank, world = dist.get_rank(), dist.get_world_size()
    (bad,), (good,) = (micro_batches(batch, rank, world, 1) for batch in batches(2))
    with engine_for(settings, model=model) as engine:
        engine.backward(engine(*bad) * (0.0 if skipped else 1.0))
        if call is not None:
            {"engine": engine, "model": model, "optimizer": engine.optimizer}[call].zero_grad()
        engine.step()
        if micro == 2:
            engine.backward(engine(*good))
            engine.step()
        return whole_weights(model)


def dropped(stage: int, micro: int, capture: str = "linear") -> dict:
    """For each call and parameter, whether the bad micro-batch has moved it; for each call, whether AdamW does so."""
    run = functools.partial(train, stage, micro, capture)
    kept, without = run(False, None), run(False, None, skipped=True)
    seen = {"kept": kept, "without": without, **{call: run(False, call) for call in CALLS}}
    kept, without = run(True, None)["embed.weight"], run(True, None, skipped=True)["embed.weight"]
    seen["AdamW keeps it"] = {call: nearer(run(True, call)["embed.weight"], kept, without) for call in CALLS}
    return seen


def nearer(weight, kept, without) -> bool:
    assert float((kept - without).norm()) > 1e-3  # the control
    return float((weight - kept).norm()) < float((weight - without).norm())


# Of one micro-batch, stages 1 to 3 have AdamW's gradients in buffers of their own when backward ends.
KEPT = {
    (0, 2): set(),
    (1, 2): set(),
    (2, 2): set(),  # with adamw_reduce "step"; stock AdamW's stage 2 has sent the first one by then
    (3, 2): {"engine", "model"},
    (0, 1): set(),
    (1, 1): set(CALLS),
    (2, 1): set(CALLS),
    (3, 1): set(CALLS),
}


@on_ranks(dropped, stage=[0, 1, 2, 3], micro=[1, 2])
def test_the_matrices_follow_adamws_part(ran):
    check(ran)


@on_ranks(dropped, stage=[0, 2], micro=[2], capture=["hook"])
def test_the_matrices_follow_adamws_part_with_hooks(ran):
    check(ran)


def check(ran) -> None:
    kept = KEPT[ran.stage, ran.micro]
    for result in ran.ranks:
        if (ran.stage, ran.micro) != (2, 2):
            assert {call for call, keeps in result["AdamW keeps it"].items() if keeps} == kept
        for call in CALLS:
            wanted = result["kept" if call in kept else "without"]
            for name in [*Toy.MATRICES, "embed.weight", "head.weight", "norm.weight"]:
                far = float((result[call][name] - wanted[name]).norm() / wanted[name].norm())
                assert far < 1e-6, (call, name, far)


def looked_at(stage: int, look: bool) -> dict:
    """``torch.autograd.grad`` with respect to an activation, between backward and step."""
    model = toy()
    part = micro_batches(batches(1)[0], dist.get_rank(), dist.get_world_size(), 1)[0]
    with engine_for(config(stage), model=model) as engine:
        engine.backward(engine(*part))
        if look:
            x = torch.randn(2, 35, requires_grad=True)
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                torch.autograd.grad(model.widen(x).square().sum(), x)
        engine.step()
        return whole_weights(model)


def looks(stage: int) -> dict:
    return {"with": looked_at(stage, True), "without": looked_at(stage, False)}


@on_ranks(looks, stage=[0, 1, 2, 3])
def test_a_gradient_with_respect_to_an_activation_changes_nothing(ran):
    for result in ran.ranks:
        for name, weight in result["with"].items():
            assert torch.equal(weight, result["without"][name]), name
