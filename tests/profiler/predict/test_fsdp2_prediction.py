"""What FSDP2 will take: its own code under fake tensors, against arithmetic on what has to be gathered and reduced."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ds_mofa.profiler.predict import PredictionError, predict
from ds_mofa.profiler.predict.prediction import plan_of
from ds_mofa.profiler.setting import RunSetting
from ds_mofa.profiler.storages import StorageTracker, of_fsdp2

TINY = str(Path(__file__).resolve().parents[3] / "configs/models/llama-tiny.json")
WIDTH, LAYERS = 192, 4  # of that model


def plan(run: str, gpus: int = 2, shape: str = "32x2"):
    return plan_of(RunSetting.parse(run, model_config=TINY, gpus=gpus, shape=shape))


def numbers(found, part: str) -> int:
    return sum(p.numel for p in found.batch.parameters if part in p.name)


@pytest.mark.parametrize(
    ("run", "reduced"),
    [
        ("fsdp2:AdamW", 2),  # bytes of a number that is reduced
        ("fsdp2:AdamW:weights=fp32", 4),
        ("fsdp2:MoFaSGD:r=4", 2),
        ("fsdp2:MoFaSGD:r=4:weights=fp32", 4),
    ],
)
def test_in_backward_two_layers_are_gathered_and_one_is_reduced(run, reduced):
    found = plan(run)
    layer = numbers(found, ".layers.1.")
    rest = numbers(found, "") - LAYERS * layer
    sent = 2 * WIDTH if "MoFaSGD" in run else layer  # the norms' gradients; or all
    # Gathered in bf16, the rest all the time; what is reduced waits as a whole until the next layer's is.
    expected = 2 * (rest + 2 * layer) + reduced * sent
    cast = 2 * layer // 2 if "fp32" in run else 0  # a shard in the dtype that it is gathered in
    highest = max(moment.communication for moment in found.batch.peaks if moment.completed)
    assert expected <= highest <= expected + cast


def test_what_is_gathered_in_eight_bits_is_half():
    wide, narrow = plan("fsdp2:MoFaSGD:r=4"), plan("fsdp2:MoFaSGD:r=4:weights=int8")
    matrices = sum(p.numel for p in narrow.batch.parameters if p.eight_bits and ".layers.1." in p.name)
    assert matrices > 0.99 * numbers(narrow, ".layers.1.")
    spared = 2 * (2 - 33 / 32) * matrices  # two layers are there at a time
    most = [max(moment.communication for moment in found.batch.peaks if moment.completed) for found in (wide, narrow)]
    assert most[0] - most[1] == pytest.approx(spared, rel=0.02)


def test_what_stays_gathered_is_all_there_at_the_loss():
    kept, always, let_go = (plan(f"fsdp2:AdamW{word}") for word in (":reshard=0", ":gathered=1", ""))
    assert kept.batch.peaks[0].communication >= 2 * numbers(kept, "")
    assert let_go.batch.peaks[0].communication < 2 * numbers(kept, "")
    assert always.batch.peaks[0].communication >= 2 * numbers(kept, "")
    at_the_end = [run.batch.peaks[-1].communication for run in (always, kept)]
    assert at_the_end[0] >= 2 * numbers(kept, "") > at_the_end[1]


def test_shards_are_a_part_and_replicas_hold_more():
    found = {run: predict(RunSetting.parse(run, model_config=TINY, gpus=4, shape="32x2"))["categories"] for run in (
        "fsdp2:AdamW", "fsdp2:AdamW:replicas=2", "fsdp2:AdamW:weights=fp32", "ddp:AdamW"
    )}  # fmt: skip
    plain, hybrid, fp32, whole = found.values()
    for kind in ("weights", "AdamW states", "gradients"):
        assert 4 * plain[kind] == 2 * hybrid[kind] == 2 * fp32[kind] == whole[kind]


def test_offload_leaves_neither_weights_nor_gradients_nor_moments():
    here, there = (
        predict(RunSetting.parse(f"fsdp2:MoFaSGD:r=4{word}", model_config=TINY, gpus=2))
        for word in ("", ":offload=param")
    )
    moved = sum(here["categories"][kind] for kind in ("weights", "AdamW states", "gradients"))
    assert there["host"] == moved and not there["categories"].keys() & {"weights", "AdamW states", "gradients"}
    assert there["categories"]["factors"] == here["categories"]["factors"]  # the update is on the device


def test_what_cannot_be_predicted_says_so():
    with pytest.raises(PredictionError, match="inductor's choice. Predict it without compiled"):
        predict(RunSetting.parse("fsdp2:AdamW:compiled=1", model_config=TINY, gpus=2))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(PredictionError, match="this process has joined real ones"):
            predict(RunSetting.parse("fsdp2:AdamW", model_config=TINY, gpus=3))
    finally:
        dist.destroy_process_group()
    assert predict(RunSetting.parse("fsdp2:AdamW", model_config=TINY, gpus=3))
    assert not dist.is_initialized()  # the ranks that pretend have gone


def test_a_storage_that_is_resized_dies_and_is_born_again():
    kept = torch.empty(100)
    with StorageTracker([kept]) as tracker:
        kept.untyped_storage().resize_(0)
        kept.untyped_storage().resize_(400)
        made = torch.empty(50)
        made.untyped_storage().resize_(0)
        assert tracker.live == 400 and tracker.peak == 600
        del made
        kept.untyped_storage().resize_(0)
    assert tracker.live == 0 and [one.size for one in tracker.allocations] == [400, 200]
    assert all(one.born <= one.died < 1 << 62 and not of_fsdp2(one) for one in tracker.allocations)
    torch.empty(8).untyped_storage().resize_(0)  # no longer watched
    assert len(tracker.allocations) == 2


def test_liger_kernels_operators_are_known_under_fsdp2_as_without():
    """They spare activations, by as much: fully_shard makes new classes of the model's, of another file."""
    spared = {}
    for backend in ("torch", "fsdp2"):
        kept = [
            predict(RunSetting.parse(f"{backend}:MoFaSGD:r=4{word}", model_config=TINY, gpus=1, shape="256x1"))
            for word in ("", ":liger=1")
        ]
        spared[backend] = kept[0]["allocated"] - kept[1]["allocated"]
    assert spared["torch"] > 3e6
    assert spared["fsdp2"] == pytest.approx(spared["torch"], rel=0.25)
