"""Products in floats of eight bits on several ranks: each engine's gathered weights give what one process gets."""

import pytest
from comparing import equal
from engines import mofasgd, step_on, whole
from launching import on_ranks
from torch.distributed.fsdp import fully_shard
from toys import Even, batches
from training import config, engine_for, toy, train_step, whole_weights

STEPS = 4


def run(way: str) -> dict:
    """Losses with and without, and the weights with."""
    losses: dict = {}
    for eight in (False, True):
        model = toy(Even)
        if way == "fsdp2":
            model = fully_shard(model.bfloat16())
            optimizer = mofasgd(model, fp8=eight)
            losses[eight] = [step_on(model, optimizer, batch)[0] for batch in batches(STEPS)]
            weights = whole(model)
            continue
        settings = config(int(way[-1]), dtype="bf16", options={"fp8": eight})
        with engine_for(settings, model=model) as engine:
            losses[eight] = [train_step(engine, batch) for batch in batches(STEPS)]
            weights = whole_weights(engine.module)
    return {"exact": losses[False], "eight": losses[True], "weights": weights}


@on_ranks(run, way=["zero0", "zero2", "zero3", "fsdp2"], world=[1, 2])
def test_losses_are_those_without_but_for_the_rounding(ran):
    for result in ran.ranks:
        assert result["eight"] == pytest.approx(result["exact"], rel=0.01)
        assert result["eight"] != result["exact"]
        assert equal(result["weights"], ran.ranks[0]["weights"])
