"""AdamW's moments in 8 bits under ZeRO: where they are, that they train, that they resume bit for bit, what is refused."""

import contextlib
import io
from pathlib import Path

import pytest
from comparing import equal
from deepspeed import comm as dist
from launching import on_ranks
from scenes.resuming import DATA, SCHEDULE, end_of
from torch import nn
from toys import HIDDEN, WIDTH, Toy
from training import config, engine_for, toy, train_step, whole_weights

from ds_mofa.adamw.eight_bit import BLOCK, SMALLEST
from ds_mofa.backends.deepspeed import universal
from ds_mofa.backends.deepspeed.checkpoints import CheckpointError

FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}  # at stage 1 another optimizer of DeepSpeed's
OWN_MASTERS = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
SUB_GROUPS = {"zero_optimization": {"sub_group_size": 8000}}


class Wide(Toy):
    """Embedding and head of 13 930 elements each: neither they nor a half of them are whole blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(398, WIDTH)
        self.head = nn.Linear(WIDTH, 398, bias=False)


ON_ADAMW = 2 * 398 * WIDTH + HIDDEN + 2 * WIDTH


def settings_for(stage: int, dtype: str, states: str = "8bit", **rest) -> dict:
    settings = config(stage, dtype=dtype, scheduler=SCHEDULE, gradient_clipping=0.5, **rest)
    del settings["optimizer"]["params"]["torch_adam"]
    settings["optimizer"]["params"] |= {"adamw_states": states} | ({"torch_adam": True} if states == "full" else {})
    return settings


def trained_both_ways(stage: int, dtype: str, micro: int = 2, **rest) -> dict:
    """Six steps with each kind of states; with 8 bits also saved after three and resumed from other weights."""
    with engine_for(settings_for(stage, dtype, "full", micro=micro, **rest), model=toy(Wide)) as engine:
        start = whole_weights(engine.module)["head.weight"].double()
        full = [train_step(engine, batch) for batch in DATA]
        wanted = whole_weights(engine.module)["head.weight"].double()
    settings = settings_for(stage, dtype, micro=micro, **rest)
    with contextlib.redirect_stdout(io.StringIO()) as log, engine_for(settings, model=toy(Wide)) as engine:
        losses = [train_step(engine, batch) for batch in DATA[:3]]
        engine.save_checkpoint("saved")
        uninterrupted = end_of(engine)
        moments = [
            {name: value for name, value in state.items() if name != "step"}
            for state in engine.basic_optimizer.adamw.state.values()
        ]
    with engine_for(settings, model=toy(Wide, seed=1)) as engine:
        engine.load_checkpoint("saved")
        resumed = end_of(engine)
    ends = uninterrupted["weights"]["head.weight"].double()
    return {
        "full": full,
        "apart": float((ends - wanted).norm() / (wanted - start).norm()),
        "losses": losses + uninterrupted["losses"],
        "moments": moments,
        "log": log.getvalue(),
        "uninterrupted": uninterrupted,
        "resumed": resumed,
    }


KINDS = [
    *(dict(stage=stage, dtype="bf16") for stage in (0, 1, 2, 3)),
    dict(stage=0, dtype="fp32"),
    dict(stage=3, dtype="bf16", **SUB_GROUPS),
    dict(stage=1, dtype="bf16", **FP32_ACCUMULATION),
    dict(stage=2, dtype="bf16", **OWN_MASTERS),
]

# Of the head's movement with full moments, at most how much another it is; 1 if it stands still. What is looked at is bf16
# weights, whose rounding is most of it; without fp32 masters full moments lose small updates to it, which 8-bit ones keep.
APART = {"fp32": 0.04, "bf16": 0.1, "own masters": 0.4}


@on_ranks(trained_both_ways, *KINDS)
def test_8_bit_moments_train_as_full_ones_do_and_resume_bit_for_bit(ran):
    for result in ran.ranks:
        assert equal(result["uninterrupted"], result["resumed"])
        assert result["losses"] == pytest.approx(result["full"], rel=1e-3)
        assert result["losses"] != result["full"]
        assert result["apart"] < APART["own masters" if "master" in ran.case.arguments else ran.dtype]
        assert equal(result["uninterrupted"]["weights"], ran.ranks[0]["uninterrupted"]["weights"])


@on_ranks(trained_both_ways, *KINDS)
def test_moments_take_a_byte_a_number_wherever_a_partition_ends(ran):
    world = 1 if ran.stage == 0 else ran.case.world
    for result in ran.ranks:
        by_kind: dict[str, int] = {}
        for state in result["moments"]:
            for name, value in state.items():
                kind = name.removeprefix("exp_avg").removeprefix("_sq")
                by_kind[kind] = by_kind.get(kind, 0) + value.numel() * value.element_size()
        whole, coded = 2 * ON_ADAMW // world, by_kind["_codes"]  # numbers of both moments
        wide = (by_kind.get("_rest", 0) + by_kind.get("", 0)) // 4
        assert whole <= coded + wide <= whole + 64  # padding
        assert by_kind["_scales"] == coded // BLOCK * 4
        # Alone, a partition of some 14 000 elements leaves less than a block; else the small parameters are there too.
        least = 0.97 if ran.stage else 0.98
        assert coded >= least * whole
        assert all(value.numel() < max(BLOCK, SMALLEST) for state in result["moments"] for value in wide_of(state))


def wide_of(state: dict) -> list:
    return [value for name, value in state.items() if name in ("exp_avg", "exp_avg_sq") or name.endswith("_rest")]


@on_ranks(trained_both_ways, *KINDS)
def test_a_line_says_how_many_parameters_have_8_bits(ran):
    lines = [line for line in ran.ranks[0]["log"].splitlines() if "AdamW's moments have 8 bits" in line]
    coded = sum(state["exp_avg_codes"].numel() for state in ran.ranks[0]["moments"] if "exp_avg_codes" in state)
    whole = coded + sum(value.numel() for state in ran.ranks[0]["moments"] for value in wide_of(state)) // 2
    assert len(lines) == 1
    assert f"have 8 bits for {coded:,} of {whole:,} parameters" in lines[0]
    assert not any("8 bits" in result["log"] for result in ran.ranks[1:])


def refused() -> dict:
    """What a checkpoint of 8-bit moments cannot be taken for, and its own config on a run with full ones."""
    with engine_for(settings_for(2, "bf16"), model=toy(Wide)) as engine:
        train_step(engine, DATA[0])
        engine.save_checkpoint("saved", tag="eight")
        weights = whole_weights(engine.module)
    found = {}
    with engine_for(settings_for(2, "bf16", "full"), model=toy(Wide, seed=1)) as engine:
        try:
            engine.load_checkpoint("saved", tag="eight")
        except CheckpointError as error:
            found["full"] = str(error)
        engine.load_checkpoint("saved", tag="eight", load_optimizer_states=False)
        found["weights"] = equal(whole_weights(engine.module), weights)
    if dist.get_rank() == 0:
        try:
            universal.convert(Path("saved/eight"), Path("saved/eight_universal"))
        except CheckpointError as error:
            found["universal"] = str(error)
    return found


@on_ranks(refused)
def test_another_kind_of_states_and_a_universal_checkpoint_are_refused_with_the_way_out(ran):
    for result in ran.ranks:
        assert "adamw_states='8bit', this run has 'full': set adamw_states='8bit'" in result["full"]
        assert result["weights"]
    assert "8 bits (adamw_states)" in ran.ranks[0]["universal"]
    assert "load_optimizer_states=False" in ran.ranks[0]["universal"]
