"""bf16, fp16 and autocast: near the float64 reference and equal on all ranks."""

import pytest
import torch
from comparing import STEPS, dense, distances, equal
from deepspeed import comm as dist
from launching import on_ranks
from scenes.overflow import SCALER
from scenes.resuming import saved_and_resumed
from toys import Toy, batches, micro_batches
from training import config, engine_for, mean_over_ranks, train, train_step, whole_weights

FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}  # at stage 1 another optimizer of DeepSpeed's
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}

KINDS = {
    "bf16": {"dtype": "bf16"},
    "bf16-fp32-accumulation": {"dtype": "bf16", **FP32_ACCUMULATION},
    "fp16": {"dtype": "fp16", "fp16": SCALER},
    "torch_autocast": AUTOCAST,
}
STAGES = {"bf16": [0, 1, 2, 3], "bf16-fp32-accumulation": [1, 2, 3], "fp16": [1, 2, 3], "torch_autocast": [0, 1, 2, 3]}
SMALL, CLIP = 1e-4, 0.2


def reduced(stage: int, kind: str) -> dict:
    return train(config(stage, gradient_clipping=CLIP, micro=3, **KINDS[kind]), STEPS)


def under_autocast(stage: int, capture: str) -> dict:
    def step(engine, batch) -> float:
        (part,) = micro_batches(batch, dist.get_rank(), dist.get_world_size(), 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = engine(*part)
        engine.backward(loss)
        engine.step()
        return mean_over_ranks(loss.detach().clone())

    return train(config(stage, options={"capture": capture}), STEPS, step=step)


def small_steps(stage: int, rounding: str) -> dict:
    """Ten steps, each far below half a spacing of most bf16 weights."""
    settings = config(stage, dtype="bf16", options={"lr": SMALL, "weight_decay": 0.0, "rounding": rounding})
    with engine_for(settings) as engine:
        start = whole_weights(engine.module)
        for batch in batches(10):
            train_step(engine, batch)
        return {"start": start, "end": whole_weights(engine.module)}


def arrived(result: dict) -> float:
    """Share of the intended movement of all matrices that the weights have made."""
    start, end = dense(steps=0)["weights"], dense(steps=10, lr=SMALL, weight_decay=0.0)["weights"]
    wanted = torch.cat([(end[name] - start[name]).flatten() for name in Toy.MATRICES])
    moved = [(result["end"][name].double() - result["start"][name].double()).flatten() for name in Toy.MATRICES]
    return float(torch.cat(moved) @ wanted / (wanted @ wanted))


def assert_near(ran, wanted: dict) -> None:
    """Losses and matrices to 1 %; biases start at zero, where AdamW's first steps have the sign of noise."""
    first, matrices = ran.ranks[0], {name: wanted["weights"][name] for name in Toy.MATRICES}
    wanted = {**wanted, "weights": matrices}
    for result in ran.ranks:
        assert distances(result, {**wanted, "momenta": {}})["losses"] < 0.01
        assert distances(result, {**wanted, "momenta": {}})["weights"] < 0.01
        assert equal(result["weights"], first["weights"])
    assert distances(first, wanted)["momenta"] < 0.1


@on_ranks(reduced, *(dict(kind=kind, stage=stage) for kind, stages in STAGES.items() for stage in stages))
def test_reduced_precision_stays_near_the_reference(ran):
    assert_near(ran, dense(clip=CLIP))
    for result in ran.ranks:
        assert result["norms"] == pytest.approx(dense(clip=CLIP)["norms"], rel=0.03)


@on_ranks(saved_and_resumed, dict(stage=1, dtype="bf16", **FP32_ACCUMULATION), dict(stage=2, dtype="fp16", fp16=SCALER))
def test_other_optimizers_resume_bit_for_bit(ran):
    for result in ran.ranks:
        assert equal(result["saved"], result["loaded"])
        assert equal(result["uninterrupted"], result["resumed"])


@on_ranks(under_autocast, *(dict(stage=stage, capture="linear") for stage in range(4)), dict(stage=3, capture="hook"))
def test_plain_autocast_stays_near_the_reference(ran):
    assert_near(ran, dense())


@on_ranks(small_steps, stage=[0, 1, 2, 3], rounding=["stochastic"])
def test_small_updates_arrive_in_bf16(ran):
    for result in ran.ranks:
        assert 0.8 < arrived(result) < 1.2


@on_ranks(small_steps, stage=[2], rounding=["nearest"])
def test_small_updates_are_lost_by_rounding_to_nearest(ran):
    """The control: what stochastic rounding is for."""
    assert arrived(ran.ranks[0]) < 0.6
