"""A run of six steps, and the same run saved and ended after three and resumed by another engine."""

import toys
from comparing import equal
from toys import batches
from training import config, engine_for, toy, train_step, whole_weights

DATA = batches(6)
SCHEDULE = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 8, "warmup_max_lr": 2e-3}}


def saved_and_resumed(stage: int, dtype: str, seed: int = 1, kind: str = "Toy", **rest) -> dict:
    """Six steps, saved after three; then three again by an engine that starts from other weights: those of ``seed``.

    Args:
        kind: of toy.
    """
    settings = config(stage, dtype=dtype, scheduler=SCHEDULE, gradient_clipping=0.5, **rest)
    model = getattr(toys, kind)
    with engine_for(settings, model=toy(model)) as engine:
        for batch in DATA[:3]:
            train_step(engine, batch)
        engine.save_checkpoint("saved")
        saved = whole_weights(engine.module)
        uninterrupted = end_of(engine)
    with engine_for(settings, model=toy(model, seed=seed)) as engine:
        engine.load_checkpoint("saved")
        loaded = whole_weights(engine.module)
        resumed = end_of(engine)
    return {"uninterrupted": uninterrupted, "resumed": resumed, "saved": saved, "loaded": loaded}


def end_of(engine) -> dict:
    losses = [train_step(engine, batch) for batch in DATA[3:]]
    state = engine.basic_optimizer.matrices.state_dict()
    return {
        "losses": losses,
        "lr": [group["lr"] for group in engine.basic_optimizer.param_groups],
        "weights": whole_weights(engine.module),
        "state": state,
    }


OFFLOADED = [
    {"stage": 2, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    {"stage": 3, "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
]


def assert_resumed(ran) -> None:
    for result in ran.ranks:
        assert equal(result["saved"], result["loaded"])
        for what in ("losses", "lr", "weights", "state"):
            assert equal(result["uninterrupted"][what], result["resumed"][what]), what
    assert ran.ranks[0]["resumed"]["state"]["steps"] == 6
    assert not equal(ran.ranks[0]["saved"], ran.ranks[0]["resumed"]["weights"])
