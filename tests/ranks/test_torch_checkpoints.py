"""torch.distributed.checkpoint: what one run saves another resumes, on the same ranks bit for bit, on others to rounding."""

import torch
from comparing import equal
from launching import cases, on_ranks
from scenes.torch_checkpoints import assert_continued, resumed, saved
from toys import Toy

WAYS = ["dcp", "flat", "full"]
BF16 = {"dtype": "bfloat16"}
MASTERS = {"dtype": "bfloat16", "master_weights": True}
SAVED = cases(saved)


@on_ranks(saved, {}, BF16, MASTERS)
def test_a_reader_finds_the_state_before_the_first_step_and_takes_none(ran):
    fresh = ran.ranks[0]["fresh"]
    for result in ran.ranks:
        assert result["fresh"]["keys"] == fresh["keys"]
        assert result["fresh"]["steps"] == [0, 0] and not result["fresh"]["moved"] and not result["fresh"]["left"]
        assert set(result["fresh"]["lr"]) == {2e-3}
        assert result["now"]["counters"] == [3, 3]
    assert {f"{name} {key}" for name in Toy.MATRICES for key in ("U", "V", "sigma", "step")} <= set(fresh["keys"])
    # Nine others that AdamW trains: their moments are there too.
    assert sum(key.endswith("exp_avg_sq") for key in fresh["keys"]) == 5
    rows = [result["fresh"]["rows"] for result in ran.ranks]
    assert [part["up.weight"] for part in rows] == [(27, 4), (26, 4)]


@on_ranks(saved, MASTERS)
def test_masters_are_dtensors_and_not_the_weights(ran):
    now = ran.ranks[0]["now"]
    assert now["masters"].keys() == set(Toy.MATRICES) and not now["plain masters"]
    for name, master in now["masters"].items():
        assert torch.equal(master.bfloat16(), now["weights"][name]) and not torch.equal(
            master, now["weights"][name].float()
        )


@on_ranks(resumed, after=SAVED, way=WAYS)
def test_on_the_same_ranks_it_is_the_uninterrupted_run_bit_for_bit(ran):
    assert_the_same_bits(ran)


@on_ranks(resumed, BF16, after=cases(saved, BF16), way=["dcp"])
def test_stochastic_rounding_goes_on_with_the_same_bits(ran):
    assert_the_same_bits(ran)


@on_ranks(resumed, MASTERS, after=cases(saved, MASTERS), way=WAYS)
def test_masters_go_on_with_the_same_bits(ran):
    assert_the_same_bits(ran)
    assert equal(ran.ranks[0]["loaded"]["masters"], ran.before.ranks[0]["now"]["masters"])


def assert_the_same_bits(ran) -> None:
    for result, first in zip(ran.ranks, ran.before.ranks, strict=True):
        assert result["loaded"]["counters"] == [3, 3]
        assert equal(result["loaded"]["weights"], first["now"]["weights"])
        for what in ("losses", "weights", "momenta"):
            assert equal(result["end"][what], first["end"][what]), what
        assert not equal(result["end"]["weights"], first["now"]["weights"])


@on_ranks(resumed, world=[1, 3], after=SAVED, way=WAYS)
def test_on_more_or_fewer_ranks_it_goes_on_to_rounding(ran):
    assert_continued(ran)


@on_ranks(resumed, {"engine": "hsdp", "way": "dcp"}, {"engine": "fsdp2", "way": "full"}, world=[4], after=SAVED)
def test_on_four_ranks_and_in_replicas_of_two_shards(ran):
    assert_continued(ran)


@on_ranks(resumed, {"engine": "ddp"}, world=[3], after=SAVED, way=["full"])
def test_into_distributed_data_parallel(ran):
    assert_continued(ran)


@on_ranks(resumed, {"engine": "one"}, world=[1], after=SAVED, way=["full"])
def test_into_one_process_without_fully_shard(ran):
    assert_continued(ran)
