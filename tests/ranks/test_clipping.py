"""Gradient clipping by one norm over AdamW's gradients and the matrices' projected ones, in every stage."""

import pytest
from comparing import STEPS, assert_same, dense, distances
from launching import on_ranks
from training import TIGHT, config, train

WIDE = 1e3


def clipped(stage: int, micro: int, clip: float, dtype: str = "fp32") -> dict:
    return train(config(stage, dtype=dtype, micro=micro, gradient_clipping=clip), STEPS)


@on_ranks(clipped, {"micro": 3, "clip": TIGHT}, stage=[0, 1, 2, 3])
def test_clipping_agrees_with_the_reference(ran):
    assert_same(ran, dense(clip=TIGHT))


@on_ranks(clipped, {"micro": 1, "clip": WIDE}, stage=[0, 1, 2, 3])
def test_a_bound_that_no_gradient_reaches_changes_nothing(ran):
    assert_same(ran, dense())


@on_ranks(clipped, {"micro": 3, "clip": TIGHT}, {"micro": 1, "clip": 0.0}, stage=[0, 1, 2, 3])
def test_the_global_norm_is_the_references(ran):
    """Also where nothing is clipped; it catches a wrong scale of the sketches, which U V^T would not show."""
    for result in ran.ranks:
        assert result["norms"] == pytest.approx(dense(clip=ran.clip)["norms"], rel=1e-5)


@on_ranks(clipped, {"micro": 3, "clip": TIGHT, "dtype": "bf16"}, stage=[0, 1, 2, 3])
def test_the_global_norm_in_bf16_is_the_references_to_its_precision(ran):
    for result in ran.ranks:
        assert result["norms"] == pytest.approx(dense(clip=TIGHT)["norms"], rel=0.03)


def test_the_bound_is_one_that_clips():
    """The control: every step's norm is far above the tight bound, and clipping shows in momenta and weights."""
    assert min(dense()["norms"]) > 2 * TIGHT and max(dense()["norms"]) < WIDE
    far = distances(dense(clip=TIGHT), dense())
    assert far["momenta"] > 0.1 and far["weights"] > 1e-4
