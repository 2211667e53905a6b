"""A checkpoint is resumed on another number of ranks, in another stage and with another rank of the factors."""

import json

import torch
from comparing import equal
from launching import cases, on_ranks
from scenes.elastic import UNIVERSAL, assert_continued, raw_conversion, refused, resumed, saved
from toys import Toy


def converted_by_deepspeed(before: str, stage: int) -> dict:
    """As :func:`resumed`, through DeepSpeed's own converter and nothing of ours."""
    raw_conversion(before)
    return resumed(stage, before=".", tag="raw")


def sharded_on_one(world: int, stage: int, **_) -> bool:
    return world == 3 or stage > 1


@on_ranks(
    resumed, world=[1, 3], after=cases(saved, stage=[1, 2, 3]), stage=[1, 2, 3], keeps=sharded_on_one, pairwise=True
)
def test_more_or_fewer_ranks_and_another_stage_through_a_universal_checkpoint(ran):
    assert_continued(ran)


@on_ranks(resumed, after=cases(saved, stage=[1]), stage=[2], universal=[False])
def test_stage_2_loads_a_checkpoint_of_stage_1_as_it_is(ran):
    assert_continued(ran)


@on_ranks(resumed, after=cases(saved, stage=[2]), stage=[1], universal=[False])
def test_stage_1_loads_a_checkpoint_of_stage_2_as_it_is(ran):
    assert_continued(ran)


@on_ranks(resumed, world=[1, 3], after=cases(saved, stage=[0], universal=[False]), stage=[0], universal=[False])
def test_stage_0_loads_its_own_on_any_number_of_ranks(ran):
    assert_continued(ran)


@on_ranks(converted_by_deepspeed, world=[3], after=cases(saved, stage=[2]), stage=[1])
def test_what_deepspeed_converts_from_stage_2_loads_into_1_and_2(ran):
    assert_continued(ran)


@on_ranks(converted_by_deepspeed, world=[1], after=cases(saved, stage=[3]), stage=[3])
def test_what_deepspeed_converts_from_stage_3_loads_into_3(ran):
    assert_continued(ran)


MASTERS = {"dtype": "bf16", "options": {"master_weights": True}}


@on_ranks(resumed, MASTERS, world=[1, 3], after=cases(saved, MASTERS, stage=[2, 3]), stage=[2, 3], pairwise=True)
def test_fp32_masters_change_world_size_and_stage(ran):
    """They differ from the bf16 weights: read from those, they would be a spacing off."""
    assert_continued(ran, tolerance=2e-2)  # bf16 activations of another micro-batch size
    saved, loaded = whole_masters(ran.before), whole_masters(ran)
    weights = ran.before.ranks[0]["state"]["weights"]
    for name in Toy.MATRICES:
        assert torch.equal(saved[name], loaded[name])
        assert not torch.equal(saved[name], weights[name].float().flatten())


def whole_masters(ran) -> dict:
    """Of shards, or of what rank 0 has alone."""
    numel = {name: value.numel() for name, value in ran.ranks[0]["state"]["weights"].items()}
    parts = {name: [result["masters"].get(name, torch.empty(0)) for result in ran.ranks] for name in Toy.MATRICES}
    return {name: torch.cat(some)[: numel[name]] for name, some in parts.items()}


BF16 = {"dtype": "bf16"}
BF16_ACCUMULATING = {"dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}}


@on_ranks(resumed, BF16, world=[3], after=cases(saved, BF16, BF16_ACCUMULATING, stage=[1]), stage=[3])
def test_bf16_and_both_of_deepspeeds_optimizers_for_it(ran):
    assert_continued(ran, tolerance=2e-2)


@on_ranks(resumed, BF16_ACCUMULATING, world=[3], after=cases(saved, BF16, stage=[3]), stage=[1])
def test_bf16_into_deepspeeds_other_optimizer_for_it(ran):
    assert_continued(ran, tolerance=2e-2)


FP16 = {"dtype": "fp16", "fp16": {"initial_scale_power": 8, "loss_scale_window": 2}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "options": {"torch_adam": False}}


@on_ranks(resumed, FP16, world=[3], after=cases(saved, FP16, stage=[2]), stage=[3])
def test_fp16(ran):
    assert_continued(ran, tolerance=2e-2)


@on_ranks(resumed, OFFLOAD, world=[1], after=cases(saved, OFFLOAD, stage=[3]), stage=[2])
def test_offloaded_moments_of_deepspeeds_own_adamw(ran):
    assert_continued(ran)


RANKS = [{"options": {"rank": 2}}, {"options": {"rank": 9}}]


@on_ranks(resumed, *RANKS, after=cases(saved, stage=[3]), stage=[3], universal=[False])
def test_another_rank_of_the_factors(ran):
    assert_resized(ran)


@on_ranks(resumed, *RANKS, world=[3], after=cases(saved, stage=[3]), stage=[2])
def test_another_rank_of_the_factors_and_another_world_and_stage(ran):
    assert_resized(ran)


def assert_resized(ran) -> None:
    """The leading directions are the saved ones, and the factors are orthonormal; training goes on."""
    rank = ran.options["rank"]
    saved, loaded = ran.before.ranks[0]["state"], ran.ranks[0]["state"]
    for result in ran.ranks:
        assert equal(result["state"]["weights"], saved["weights"])
        losses = result["end"]["losses"]
        assert all(abs(x - y) < 0.05 * y for x, y in zip(losses, ran.before.ranks[0]["end"]["losses"]))
    for name, new in loaded["factors"]["matrices"].items():
        old = saved["factors"]["matrices"][name]
        k = min(rank, len(old["sigma"]))
        assert len(new["sigma"]) == rank
        for key in ("U", "V", "sigma"):
            assert torch.equal(new[key][..., :k], old[key][..., :k])
        assert not new["sigma"][k:].any()
        for basis in (new["U"].double(), new["V"].double()):
            assert (basis.mT @ basis - torch.eye(rank)).abs().max() < 1e-5


# What to load, how, and what the message must say.
REFUSALS = {
    "plain, of two ranks": ({"stage": 2}, ["2 data-parallel ranks, this run has", "to_universal", "load_universal"]),
    "plain, of another stage": ({"stage": 3}, ["saved at ZeRO stage 2, this run is at stage 3", "to_universal"]),
    "into stage 0": ({"stage": 0}, ["this run is at stage 0", "save_16bit_model", "stage 1 has"]),
    "a universal one, not asked for": (
        {"stage": 2, "tag": "third_universal"},
        ["is a universal checkpoint", '"checkpoint": {"load_universal": true}'],
    ),
    "asked for, not a universal one": (UNIVERSAL | {"stage": 2}, ["is no universal checkpoint", "to_universal"]),
    "no such tag": ({"stage": 2, "tag": "thrid"}, ["no such checkpoint", "third, third_universal"]),
    "other matrices": (
        UNIVERSAL | {"stage": 2, "tag": "third_universal", "options": {"exclude": ["down"]}},
        ["'down.weight'", "there (35, 53), here none", "exclude"],
    ),
    "converted by DeepSpeed for other stages": (UNIVERSAL | {"stage": 3, "raw": True}, ["ds_to_universal", "for all"]),
}


@on_ranks(refused, *[arguments for arguments, _ in REFUSALS.values()], world=[1], after=cases(saved, stage=[2]))
def test_what_does_not_fit_is_refused_with_the_way_out_and_changes_nothing(ran):
    arguments = json.loads(ran.case.arguments)
    (expected,) = [parts for given, parts in REFUSALS.values() if given == arguments]
    for result in ran.ranks:
        assert result["untouched"]
        for part in expected:
            assert part in result["message"], result["message"]


@on_ranks(refused, {"stage": 3, "raw": True, **MASTERS, **UNIVERSAL}, after=cases(saved, MASTERS, stage=[3]))
def test_deepspeeds_converter_loses_sharded_masters(ran):
    for result in ran.ranks:
        assert "rank 0's part of the fp32 masters" in result["message"] and "to_universal" in result["message"]
