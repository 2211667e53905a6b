"""Stage 3's gathering against moves written out by hand; sizes are whole segments, so that nothing is rounded."""

import pytest

from ds_mofa.profiler.predict.reserved.allocator import CachingAllocator
from ds_mofa.profiler.predict.reserved.gathering import gathered
from ds_mofa.profiler.predict.simulated.micro_batch import Parameter
from ds_mofa.profiler.predict.zero import ZeroSettings

MIB = 1 << 20
ELEMENTS = 10 * MIB  # of each weight: 20 MiB


def weights(*names: str) -> list[Parameter]:
    return [Parameter(name, (ELEMENTS,), ELEMENTS, "matrix") for name in names]


def settings(**options) -> ZeroSettings:
    return ZeroSettings(stage=3, world_size=2, **options)


def test_a_bucket_stays_until_its_last_weight_is_used():
    """Two weights a bucket: before a its buffer; with a two copies, and the next bucket; with c its copies' place."""
    found = gathered(settings(stage3_prefetch_bucket_size=2 * ELEMENTS), weights("a", "b", "c", "d"))
    assert found.reserved == (40 + 2 * 20 + 40) * MIB
    assert found.at_loss == 4 * 20 * MIB  # all come again soon


def test_one_weight_alone_needs_no_buffer():
    found = gathered(settings(stage3_prefetch_bucket_size=1), weights("a", "b", "c"))
    assert found.reserved == found.at_loss == 3 * 20 * MIB


def test_prefetching_ends_at_the_limit():
    names = [f"w{i}" for i in range(40)]
    limit = {"stage3_max_live_parameters": 4 * ELEMENTS, "stage3_max_reuse_distance": 2 * ELEMENTS}
    found = gathered(settings(stage3_prefetch_bucket_size=ELEMENTS, **limit), weights(*names))
    assert 3 * 20 * MIB <= found.at_loss <= 5 * 20 * MIB < 40 * 20 * MIB


def test_what_is_small_is_never_let_go_nor_gathered():
    small = Parameter("norm", (4096,), 4096, "other")
    assert gathered(settings(), [small, *weights("a")]) == gathered(settings(), weights("a"))


def test_a_leaf_is_gathered_as_one():
    layers = weights("layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k", "head")
    assert gathered(settings(stage3_prefetch_bucket_size=0), layers).reserved == 5 * 20 * MIB
    # A common buffer and two copies; the second layer's and the head come into the first one's buffer.
    found = gathered(settings(stage3_prefetch_bucket_size=0, leaf_module=True), layers)
    assert found.reserved == (40 + 4 * 20) * MIB


def layers(count: int) -> list[str]:
    return [f"layers.{i}.{name}" for i in range(count) for name in "qk"]


@pytest.mark.parametrize(("distance", "kept"), [(0, 0), (2 * ELEMENTS, 1), (2 * ELEMENTS + 1, 2), (6 * ELEMENTS, 3)])
def test_the_last_leaves_stay_for_the_model_s_backward(distance, kept):
    """A leaf counts the layers after it, and then finds itself in the model, whose backward comes first."""
    limits = {"stage3_max_reuse_distance": distance, "stage3_prefetch_bucket_size": 0}
    found = gathered(settings(**limits, leaf_module=True), weights(*layers(8)))
    assert found.at_loss == kept * 2 * 20 * MIB


@pytest.mark.parametrize(
    ("distance", "outside", "whole"),
    [
        (2 * ELEMENTS, False, ["head"]),  # head's forward and backward are that far
        (2 * ELEMENTS + 1, False, ["embed", "head"]),
        (ELEMENTS, True, ["head"]),
        (ELEMENTS + 1, True, ["embed", "head"]),
    ],
)
def test_to_an_embedding_leaves_are_no_distance(distance, outside, whole):
    limits = {"stage3_max_reuse_distance": distance, "stage3_prefetch_bucket_size": 0}
    zero = settings(**limits, leaf_module=True, head_read_outside=outside)
    found = gathered(zero, weights("embed", *layers(8), "head"))
    count = -(-distance // (2 * ELEMENTS)) if outside else max(0, -(-(distance - ELEMENTS) // (2 * ELEMENTS)))
    assert found.at_loss == (len(whole) + 2 * count) * 20 * MIB


def test_a_head_that_is_the_embedding_is_there_all_the_time():
    limits = {"stage3_max_reuse_distance": 1, "stage3_prefetch_bucket_size": 0}
    zero = settings(**limits, leaf_module=True, head_read_outside=True)
    assert gathered(zero, weights("embed", *layers(8))).at_loss == (1 + 2) * 20 * MIB


def test_one_rank_needs_no_common_buffer():
    zero = ZeroSettings(stage=3, world_size=1, stage3_prefetch_bucket_size=0, leaf_module=True)
    assert gathered(zero, weights(*layers(2))).reserved == 4 * 20 * MIB


@pytest.mark.parametrize("kept", [False, True])
def test_only_empty_segments_are_given_back(kept):
    allocator = CachingAllocator()
    large, small = allocator.alloc(64 * MIB), allocator.alloc(4 * MIB)
    allocator.free(large)
    part = allocator.alloc(30 * MIB)
    if not kept:
        allocator.free(part)
    allocator.empty_cache()
    assert allocator.reserved == (20 + 64 * kept) * MIB
    allocator.free(small)
    allocator.empty_cache()
    assert allocator.reserved == 64 * kept * MIB
