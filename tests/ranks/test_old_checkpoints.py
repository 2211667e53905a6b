"""What earlier versions saved still loads, and trains on as it did there."""

from pathlib import Path

import pytest
import torch
from launching import on_ranks
from toys import batches
from training import config, engine_for, toy, train_step, whole_weights

SAVED = Path(__file__).parents[1] / "fixtures" / "checkpoints"
DATA = batches(6)
UNITS = {"lr": 1e-2, "adamw_lr": 1e-3, "adjust_lr_fn": "match_rms_adamw"}  # their rates are in
CLOSE = {"fp32": 1e-4, "bf16": 2e-2}


def gone_on(stage: int, optimizer: str, dtype: str) -> dict:
    settings = config(stage, optimizer=optimizer, dtype=dtype, options=UNITS if optimizer == "MoFaSGD" else {})
    with engine_for(settings, model=toy(seed=1)) as engine:
        folder, _ = engine.load_checkpoint(str(SAVED / f"{optimizer.lower()}_zero{stage}_{dtype}"))
        losses = [train_step(engine, batch) for batch in DATA[3:]] if folder else []
        steps = engine.basic_optimizer.matrices.steps
        return {"losses": losses, "steps": steps, "weights": whole_weights(engine.module)}


def check(ran) -> None:
    after = torch.load(SAVED / f"{ran.optimizer.lower()}_zero{ran.stage}_{ran.dtype}" / "after.pt", weights_only=True)
    for result in ran.ranks:
        assert result["steps"] == 6
        assert result["losses"] == pytest.approx(after["losses"], rel=CLOSE[ran.dtype])
        for name, weight in after["weights"].items():
            error = (result["weights"][name].double() - weight.double()).norm() / weight.double().norm()
            assert error < CLOSE[ran.dtype], name


@on_ranks(gone_on, world=[2], stage=[2], optimizer=["MoFaSGD"], dtype=["bf16"])
def test_of_stage_2_in_bf16(ran):
    check(ran)


@on_ranks(gone_on, world=[2], stage=[3], optimizer=["MoFaSGD"], dtype=["fp32"])
def test_of_stage_3(ran):
    check(ran)


@on_ranks(gone_on, world=[2], stage=[2], optimizer=["GaLore"], dtype=["fp32"])
def test_of_galore(ran):
    check(ran)
