"""A step with an Inf or NaN on any rank is left out by all of them, and training goes on."""

from launching import on_ranks
from scenes.overflow import assert_left_out, one_bad_step


@on_ranks(one_bad_step, stage=[1, 2, 3], dtype=["fp16"], where=["loss", "sketches"], rank=[0, 1], pairwise=True)
def test_an_fp16_overflow_on_one_rank_is_left_out_by_all(ran):
    assert_left_out(ran)
    for result in ran.ranks:
        assert result["before"]["scale"] == 1024
        assert result["after"]["scale"] == result["end"]["scale"] == 512


@on_ranks(
    one_bad_step, stage=[1, 2], dtype=["fp16", "bf16"], where=["one of AdamW's gradients"], rank=[0, 1], pairwise=True
)
def test_an_inf_that_adamw_alone_has_is_left_out_by_all(ran):
    assert_left_out(ran)


@on_ranks(
    one_bad_step,
    {"where": "loss", "rank": 0},
    {"where": "sketches", "rank": 1},
    stage=[0, 1, 2, 3],
    dtype=["fp32", "bf16"],
    pairwise=True,
)
def test_a_nan_on_one_rank_is_left_out_by_all(ran):
    assert_left_out(ran)


@on_ranks(
    one_bad_step,
    {"where": "loss", "rank": 1},
    {"where": "inf in the sketches", "rank": 0},
    {"where": "inf in the sketches", "rank": 1},
    stage=[0, 1, 2, 3],
    dtype=["fp32"],
    pairwise=True,
)
def test_a_nan_or_inf_is_left_out_by_all_wherever_it_is(ran):
    assert_left_out(ran)


@on_ranks(one_bad_step, {"where": "sketches", "rank": 0, "clip": 0.5}, stage=[0, 1, 2, 3], dtype=["fp32", "bf16"])
def test_a_nan_does_not_reach_adamw_through_the_clipping(ran):
    assert_left_out(ran)
