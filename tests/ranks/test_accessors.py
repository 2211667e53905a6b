"""DeepSpeed's ``safe_get_*`` and ``safe_set_*``: a matrix is its own fp32 copy and has no gradient or moments."""

import pytest
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
)
from launching import on_ranks
from toys import batches
from training import config, engine_for, train_step, whole_weights


def asked(stage: int, dtype: str) -> dict:
    with engine_for(config(stage, dtype=dtype)) as engine:
        for batch in batches(2):
            train_step(engine, batch)
        params = dict(engine.module.named_parameters())
        matrix, head = params["up.weight"], params["head.weight"]
        result = {
            "weights": whole_weights(engine.module),
            "matrix": safe_get_full_fp32_param(matrix),
            "nothing": [safe_get_full_optimizer_state(matrix, "exp_avg"), safe_get_full_grad(matrix)],
            "head": safe_get_full_fp32_param(head),
            "moment of the head": safe_get_full_optimizer_state(head, "exp_avg"),
        }
        if stage == 3:
            result["shard"] = safe_get_local_fp32_param(matrix)
            result["nothing"] += [safe_get_local_grad(matrix), safe_get_local_optimizer_state(matrix, "exp_avg")]
        return result


def told(stage: int, dtype: str) -> dict:
    """The weight set to 1/8, in stage 3 then its shards to 1/4; and what must not be set. Larger ones saturate the tanh."""
    with engine_for(config(stage, dtype=dtype, options={"master_weights": dtype == "bf16"})) as engine:
        first, second = batches(2)
        train_step(engine, first)
        matrix = dict(engine.module.named_parameters())["up.weight"]
        eighths = torch.full((53, 35), 1 / 8)
        safe_set_full_fp32_param(matrix, eighths)
        seen = {"eighths": safe_get_full_fp32_param(matrix)}
        if stage == 3:
            safe_set_local_fp32_param(matrix, torch.full_like(matrix.ds_tensor, 1 / 4, dtype=torch.float32))
            seen["quarters"] = safe_get_full_fp32_param(matrix)
        errors = []
        for setter, extra in ((safe_set_full_grad, []), (safe_set_full_optimizer_state, ["exp_avg"])):
            try:
                setter(matrix, eighths, *extra)
            except ValueError as error:
                errors.append(str(error))
        train_step(engine, second)
        return {**seen, "errors": errors, "next": safe_get_full_fp32_param(matrix)}


@on_ranks(asked, stage=[1, 2, 3], dtype=["fp32", "bf16"])
def test_a_matrix_is_its_own_fp32_copy(ran):
    for result in ran.ranks:
        assert torch.equal(result["matrix"], result["weights"]["up.weight"].float())
        assert set(result["nothing"]) == {None}
        assert result["head"].shape == result["moment of the head"].shape == (37, 35)
    if ran.stage == 3:
        shards = torch.cat([result["shard"] for result in ran.ranks])
        assert torch.equal(shards.view(53, 35), ran.ranks[0]["matrix"])


@on_ranks(told, stage=[1, 2, 3], dtype=["fp32", "bf16"])
def test_a_weight_that_is_set_is_trained_on_and_nothing_else_can_be(ran):
    for result in ran.ranks:
        assert (result["eighths"] == 1 / 8).all()
        start = 1 / 4 if ran.stage == 3 else 1 / 8
        if ran.stage == 3:
            assert (result["quarters"] == 1 / 4).all()
        assert result["next"].mean() == pytest.approx(start, abs=0.05)
        assert not (result["next"] == start).all()
        assert len(result["errors"]) == 2 and all('"exclude"' in error for error in result["errors"])
