"""Two thousand steps with accumulation and clipping: what may drift does not. Minutes: `make test-long`."""

import gc
import tracemalloc

import psutil
import pytest
import torch
from deepspeed import comm as dist
from launching import on_ranks
from toys import batches
from training import config, engine_for, train_step, whole_weights

STEPS, LOOK_EVERY = 2000, 250
TRACED = 200  # last steps, in which Python's allocations are followed: it makes them several times slower


def long(stage: int, dtype: str) -> dict:
    data, looks, losses, traced = batches(8), [], [], []
    settings = config(stage, dtype=dtype, micro=3, gradient_clipping=0.5)
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
    process = psutil.Process()
    with engine_for({**settings, "scheduler": scheduler}) as engine:
        for number in range(1, STEPS + 1):
            loss = train_step(engine, data[number % len(data)])
            losses.append(loss)
            if number % LOOK_EVERY == 0:
                looks.append(look(engine) | {"step": number, "resident": process.memory_info().rss})
            if number == STEPS - TRACED:
                tracemalloc.start()
            if number > STEPS - TRACED and number % (TRACED // 4) == 0:
                gc.collect()
                traced.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        step = engine.basic_optimizer.matrices
        return {
            "looks": looks,
            "traced": traced,
            "losses": losses[:: STEPS // 20] + losses[-1:],
            "counts": [step.steps, step.skipped, engine.skipped_steps],
            "weights": whole_weights(engine.module),
        }


def look(engine) -> dict:
    """Distance from orthonormal of this rank's factors, and whether the weights are the other rank's bit for bit."""
    step = engine.basic_optimizer.matrices
    worst = 0.0
    for _, (U, V, _) in step.owner.kept():
        for basis in (U.double(), V.double()):
            worst = max(worst, float((basis.mT @ basis - torch.eye(basis.shape[-1])).abs().max()))
    same = True
    for value in whole_weights(engine.module).values():
        other = value.clone()
        dist.broadcast(other, 0)
        same = same and torch.equal(other, value)
    working = step.working.clone()
    dist.broadcast(working, 0)
    return {"orthonormal": worst, "same": same and torch.equal(working, step.working)}


long.seconds = 900


@pytest.mark.slow
@on_ranks(long, {"stage": 2, "dtype": "fp32"}, {"stage": 2, "dtype": "bf16"}, {"stage": 3, "dtype": "fp32"})
def test_nothing_drifts_in_two_thousand_steps(ran):
    for result in ran.ranks:
        assert result["counts"] == [STEPS, 0, 0]
        assert result["losses"][-1] < 0.5 * result["losses"][0]
        assert all(torch.isfinite(value).all() for value in result["weights"].values())
        for at in result["looks"]:
            assert at["orthonormal"] < 1e-5, at
            assert at["same"], at
        # Bytes, once the caches are warm. One tensor kept a step would be 50 kB of the first, a copy of the matrices
        # 37 MB of the second.
        traced, resident = result["traced"], [at["resident"] for at in result["looks"]]
        assert traced[-1] - traced[1] < 20_000, traced
        assert resident[-1] - resident[1] < 8 << 20, resident
