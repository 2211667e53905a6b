"""Five steps, of which the third has something that is not finite."""

import torch
from deepspeed import comm as dist
from toys import batches, micro_batches
from training import config, engine_for, train_step, whole_momenta, whole_weights

SCALER = {"loss_scale": 0, "initial_scale_power": 10, "hysteresis": 1}
BAD_STEP, STEPS = 2, 5


def one_bad_step(stage: int, dtype: str, where: str, rank: int, clip: float = 0.0, **rest) -> dict:
    """Five steps; in the third something is not finite: the loss of one rank, or one number in its sketches."""
    extra = {"fp16": SCALER} if dtype == "fp16" else {}
    with engine_for(config(stage, dtype=dtype, gradient_clipping=clip, **extra, **rest)) as engine:
        losses, seen = [], {}
        for number, batch in enumerate(batches(STEPS)):
            if number == BAD_STEP:
                seen["before"] = snapshot(engine)
                bad_step(engine, batch, where, mine=dist.get_rank() == rank)
                seen["after"] = snapshot(engine)
            else:
                losses.append(train_step(engine, batch))
        seen["end"] = snapshot(engine)
        counts = {"engine": engine.skipped_steps, "matrices": engine.basic_optimizer.matrices.skipped}
        return {**seen, "losses": losses, "skipped": counts}


def bad_step(engine, batch, where: str, mine: bool) -> None:
    (part,) = micro_batches(batch, dist.get_rank(), dist.get_world_size(), 1)
    loss = engine(*part)
    if mine and where == "one of AdamW's gradients":
        spoilt = engine.module.norm.weight.register_hook(lambda grad: grad * float("inf"))
    engine.backward(loss * float("inf") if mine and where == "loss" else loss)
    if mine and where == "one of AdamW's gradients":
        spoilt.remove()
    elif mine and where != "loss":
        engine.basic_optimizer.matrices.sketches[7] = float("inf" if where == "inf in the sketches" else "nan")
    engine.step()


def snapshot(engine) -> dict:
    step = engine.basic_optimizer.matrices
    scale = engine.optimizer.loss_scale if hasattr(engine.optimizer, "loss_scaler") else 1.0
    return {
        "weights": whole_weights(engine.module),
        "momenta": whole_momenta(engine),
        "sketches": step.sketches.clone(),
        "steps": step.steps,
        "pending": step.pending,
        "scale": float(scale),
    }


def assert_left_out(ran) -> None:
    for result in ran.ranks:
        before, after, end = result["before"], result["after"], result["end"]
        assert before["steps"] == after["steps"] == BAD_STEP
        assert result["skipped"] == {"engine": 1, "matrices": 1}
        for kind in ("weights", "momenta"):
            for name, value in before[kind].items():
                assert torch.equal(value, after[kind][name]), f"{kind} of {name} moved"
        assert not after["sketches"].any() and not after["pending"]
        # and goes on
        assert end["steps"] == STEPS - 1
        assert result["losses"][-1] < result["losses"][0] - 0.1
        for name, value in end["weights"].items():
            assert torch.isfinite(value).all()
            assert torch.equal(value, ran.ranks[0]["end"]["weights"][name])
            assert name == "frozen.weight" or not torch.equal(value, after["weights"][name])
