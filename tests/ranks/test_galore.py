"""GaLore under ZeRO: against the dense reference in every stage, offloaded, skipped, saved and resumed elsewhere."""

import pytest
from comparing import STEPS, assert_same, dense, distances, equal
from launching import cases, on_ranks
from scenes.elastic import UNIVERSAL, assert_continued, refused, resumed, saved
from scenes.offloading import ALL, CPU, NOWHERE, ONE_AT_A_TIME, assert_the_same_everywhere
from scenes.overflow import assert_left_out, one_bad_step
from scenes.resuming import OFFLOADED, assert_resumed, saved_and_resumed
from toys import Resting
from training import GALORE, TIGHT, config, toy, train

OURS = {"optimizer": "GaLore"}


def trained(stage: int, micro: int = 1, clip: float = 0.0, **rest) -> dict:
    """Five steps, of which the first and the fourth choose subspaces."""
    return train(config(stage, micro=micro, gradient_clipping=clip, **OURS, **rest), STEPS)


def wanted(clip: float = 0.0) -> dict:
    return dense(optimizer="GaLore", clip=clip, adamw_lr=adamw_lr)


def adamw_lr(step: int) -> float:
    return GALORE["adamw_lr"]


def assert_dense(ran, clip: float = 0.0) -> None:
    # A singular vector turns by the sketch's rounding over the gap to the next; R's axes, and so N, turn with it.
    assert_same(ran, wanted(clip), tolerance=5e-5)


# ---------------------------------------------------------------------- the equations


@on_ranks(trained, {"micro": 3, "clip": TIGHT}, stage=[0, 1, 2, 3])
def test_accumulated_and_clipped_it_is_the_dense_one(ran):
    assert_dense(ran, TIGHT)
    for result in ran.ranks:
        assert result["norms"] == pytest.approx(wanted(TIGHT)["norms"], rel=1e-5)


def resting(stage: int) -> dict:
    return train(config(stage, **OURS), STEPS, model=toy(Resting))


@on_ranks(resting, stage=[2, 3])
def test_matrices_unused_late_and_frozen_in_between_rest(ran):
    assert_same(ran, dense(Resting, optimizer="GaLore", adamw_lr=adamw_lr), tolerance=5e-5)


@on_ranks(trained, stage=[3], world=[3])
def test_so_on_three_ranks(ran):
    assert_dense(ran)


@pytest.mark.slow
@on_ranks(trained, stage=[0, 1, 2], world=[3])
def test_so_on_three_ranks_in_the_other_stages(ran):
    assert_dense(ran)


@pytest.mark.slow
@on_ranks(trained, stage=[2, 3], world=[1])
def test_and_on_one(ran):
    assert_dense(ran)


@on_ranks(trained, stage=[1, 3], options=[{"capture": "hook"}])
def test_by_the_hook_alone(ran):
    assert_dense(ran)


@on_ranks(trained, stage=[2, 3], dtype=["bf16"], options=[{"master_weights": True}, {}])
def test_bf16_stays_near_and_equal_on_all_ranks(ran):
    for result in ran.ranks:
        assert distances(result, {**wanted(), "momenta": {}})["losses"] < 0.01
        assert equal(result["weights"], ran.ranks[0]["weights"])


def test_the_subspaces_matter():
    """The control: with the first one for good, or with MoFaSGD's rule, the weights are others."""
    for other in (dense(optimizer="GaLore", adamw_lr=adamw_lr, refresh_every=1), dense(adamw_lr=adamw_lr)):
        assert distances(wanted(), {**other, "momenta": {}})["weights"] > 1e-3


# ---------------------------------------------------------------------- elsewhere, and left out


def everywhere(stage: int, dtype: str) -> dict:
    """One run for each place, matrix by matrix."""
    places = [NOWHERE, {"offload_optimizer": CPU}] + [ALL] * (stage == 3)
    settings = [
        config(
            stage,
            dtype=dtype,
            options=ONE_AT_A_TIME,
            zero_optimization=where,
            zero_force_ds_cpu_optimizer=False,
            **OURS,
        )
        for where in places
    ]
    return {"runs": [train(one, STEPS, look=lambda e: e.basic_optimizer.matrices._staging.peak) for one in settings]}


@on_ranks(everywhere, {"stage": 2, "dtype": "fp32"}, {"stage": 3, "dtype": "bf16"})
def test_offloading_changes_no_bit(ran):
    assert_the_same_everywhere(ran)
    for result in ran.ranks:
        first, *others = [run["seen"] for run in result["runs"]]
        assert first == 0 and all(others)


BAD = [{"stage": 2, "dtype": "fp16"}, {"stage": 3, "dtype": "bf16"}, {"stage": 0, "dtype": "fp32"}]


@on_ranks(
    one_bad_step,
    *BAD,
    where=["loss", "sketches"],
    rank=[1],
    options=[{"refresh_every": 2}],
    optimizer=["GaLore"],
)
def test_what_is_not_finite_is_left_out_by_all(ran):
    assert_left_out(ran)


# ---------------------------------------------------------------------- saved and resumed


@on_ranks(saved_and_resumed, stage=[2, 3], dtype=["fp32"], optimizer=["GaLore"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(ran):
    """Saved after the third step: the fourth chooses subspaces, by test matrices that no checkpoint holds."""
    assert_resumed(ran)


@pytest.mark.slow
@on_ranks(saved_and_resumed, stage=[0, 1], dtype=["fp32"], optimizer=["GaLore"])
def test_so_it_does_in_stages_0_and_1(ran):
    assert_resumed(ran)


@on_ranks(saved_and_resumed, *OFFLOADED, dtype=["bf16"], options=[{"torch_adam": False}], optimizer=["GaLore"])
def test_an_offloaded_run_is_resumed_bit_for_bit(ran):
    assert_resumed(ran)


SAVED = cases(saved, OURS, stage=[2])


@on_ranks(resumed, OURS, world=[3], after=SAVED, stage=[1, 3])
def test_more_ranks_and_another_stage_through_a_universal_checkpoint(ran):
    assert_continued(ran)


@on_ranks(resumed, OURS, world=[1], after=cases(saved, OURS, stage=[3]), stage=[2])
def test_fewer_ranks_and_another_stage_through_a_universal_checkpoint(ran):
    assert_continued(ran)


TAG = {**UNIVERSAL, "tag": "third_universal", "stage": 2}
REFUSED = {"type MoFaSGD": TAG, "another rank": {**TAG, **OURS, "options": {"rank": 2}}}


@on_ranks(refused, *REFUSED.values(), world=[1], after=SAVED)
def test_what_does_not_fit_is_refused_with_the_way_out_and_changes_nothing(ran):
    for result in ran.ranks:
        if ran.case.arguments.count("GaLore"):
            assert "bases have rank 4, this run's 2" in result["message"]
        else:
            assert "was saved by GaLore, this run's optimizer is MoFaSGD" in result["message"]
        assert result["untouched"] and "load_optimizer_states=False" in result["message"]
