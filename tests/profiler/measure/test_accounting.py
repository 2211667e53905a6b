"""Bytes by category against bytes counted by hand; histories against histories written by hand."""

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

import ds_mofa
from ds_mofa.optimizers.gradient import SketchedGradient
from ds_mofa.profiler.measure import curve as curves
from ds_mofa.profiler.measure.accounting import account, thin_curve
from ds_mofa.profiler.measure.history import from_snapshot
from ds_mofa.profiler.measure.inventory import Known, inventory, leaves, sizes
from ds_mofa.profiler.predict.reserved.allocator import CachingAllocator
from ds_mofa.profiler.storages import FOREVER, Allocation, StorageTracker

PEAKS = {"allocated": 100, "reserved": 130, "nvml_device": 190, "host": 1000}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.norm = nn.Embedding(32, 16), nn.Linear(16, 24, bias=False), nn.LayerNorm(24)
        self.tied = self.linear  # the same module twice is the same memory

    def forward(self, ids):
        return self.norm(self.tied(self.embed(ids))).square().mean()


def test_adamw_to_the_byte():
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.arange(8)).backward()
    numel = 32 * 16 + 16 * 24 + 2 * 24
    assert sizes(inventory(model, optimizer), "cpu") == {"weights": 4 * numel, "gradients": 4 * numel}
    optimizer.step()
    optimizer.zero_grad()
    steps = 4 * len(list(model.parameters()))  # each state has a step of its own
    assert sizes(inventory(model, optimizer), "cpu") == {"weights": 4 * numel, "AdamW states": 8 * numel + steps}


def test_mofasgd_to_the_byte():
    model, rank = Toy().bfloat16(), 4
    optimizer = ds_mofa.MoFaSGD(model, lr=1e-3, rank=rank)
    model(torch.arange(8)).backward()
    adamw, matrix = 32 * 16 + 2 * 24, 16 * 24
    flat = optimizer.matrices.layout.numel
    assert flat >= rank * (16 + 24 + 1)
    assert sizes(inventory(model, optimizer), "cpu") == {
        "weights": 2 * (adamw + matrix),
        "gradients": 2 * adamw,  # and none of the matrix
        "sketches": 4 * flat,
        "factors": (2 + 4) * flat,
    }


def test_views_are_counted_once_and_other_devices_apart():
    model = nn.Linear(8, 8, bias=False)
    flat = model.weight.data.view(-1)
    model.register_buffer("view", flat[:8])
    known = inventory(model, None)
    assert sizes(known, "cpu") == {"weights": 256} and sizes(known, "cuda") == {}


def test_a_sum_is_what_the_outermost_meter_saw():
    found = account(
        cuda=True, peaks=PEAKS, at_peak={"weights": 60, "activations": 30}, known={}, before=20, context=30,
        communication=4, base_host=0,
    )  # fmt: skip
    assert found["total"] == 190 and sum(found["categories"].values()) == 190
    assert found["categories"] == {
        "weights": 60, "activations": 30, "allocator slack": 30, "CUDA context": 30, "before this process": 20,
        "communication buffers": 4, "unexplained": 10 + 6,
    }  # fmt: skip


def test_what_is_counted_too_high_shows_as_negative():
    found = account(
        cuda=False, peaks=PEAKS, at_peak=None, known={"weights": 900}, before=None, context=None, communication=None,
        base_host=300,
    )  # fmt: skip
    assert found["categories"] == {"weights": 900, "process base": 300, "unexplained": -200} and found["total"] == 1000


def test_without_the_driver_the_sum_ends_at_the_allocator():
    peaks = {**PEAKS, "nvml_device": None}
    found = account(
        cuda=True, peaks=peaks, at_peak={"weights": 100}, known={}, before=None, context=None, communication=None,
        base_host=0,
    )  # fmt: skip
    assert found["meter"] == "PyTorch's allocator, reserved"
    assert found["categories"] == {"weights": 100, "allocator slack": 30}


def snapshot():
    """Three pieces: one from before, one freed, one left; and the allocation that compares the clocks, 1 ms late."""
    marker = 512 * 7
    events = [
        {"action": "alloc", "addr": 900, "size": 64, "time_us": 500},  # before the marker: not looked at
        {"action": "alloc", "addr": 5000, "size": marker, "time_us": 1000},
        {"action": "free_requested", "addr": 5000, "size": marker, "time_us": 1001},
        {"action": "alloc", "addr": 100, "size": 1000, "time_us": 1010, "frames": [frame("a.py", 3, "f")]},
        {"action": "segment_alloc", "addr": 4096, "size": 2048, "time_us": 1011},
        {"action": "alloc", "addr": 4096, "size": 600, "time_us": 1012},
        {"action": "free_requested", "addr": 100, "size": 1000, "time_us": 1020},
        {"action": "free_completed", "addr": 100, "size": 1000, "time_us": 1021},
        {"action": "alloc", "addr": 100, "size": 512, "time_us": 1030},  # the same address again
        {"action": "free_requested", "addr": 8000, "size": 512, "time_us": 1040},  # was there before
    ]
    blocks = [
        {"address": 100, "size": 512, "state": "active_allocated"},
        {"address": 4096, "size": 1024, "state": "active_allocated"},
        {"address": 9000, "size": 2048, "state": "active_allocated"},
        {"address": 20000, "size": 4096, "state": "inactive"},
    ]
    return {"device_traces": [events], "segments": [{"address": 100, "device": 0, "blocks": blocks}]}, marker


def frame(filename, line, name):
    return {"filename": filename, "line": line, "name": name}


def test_the_allocators_history():
    history, marker = snapshot()
    found = from_snapshot(history, 0, marker, began=2_000_000)
    # The marker's time, 1000 us, is 2,000,000 ns by the host's clock.
    assert sorted((a.address, a.size, a.born, a.died) for a in found if a.size != marker) == [
        (100, 512, 2_030_000, FOREVER),
        (100, 1024, 2_010_000, 2_020_000),
        (4096, 1024, 2_012_000, FOREVER),
        (8000, 512, 0, 2_040_000),
        (9000, 2048, 0, FOREVER),
    ]
    assert [a.stack for a in found if a.stack] == [("a.py:3 f",)]
    curve = curves.curve(found, 2_005_000)
    assert curve.totals == [2560, 3584, 4608, 3584, 4096, 3584] and max(curve.totals) == sum(curve.peak.values())


def test_a_history_without_its_beginning_is_refused():
    history, marker = snapshot()
    with pytest.raises(ValueError, match="has lost its beginning"):
        from_snapshot(history, 0, marker + 1, began=0)


def test_labels_follow_the_inventory_then_the_phase():
    pieces = [
        Allocation(1, 10, 0),  # known before
        Allocation(2, 20, 0),  # nobody's
        Allocation(3, 30, 15),  # born in forward
        Allocation(4, 40, 25, 28),  # in backward, gone when looked at
        Allocation(4, 40, 30),  # the same address, a gradient by then
        Allocation(5, 50, 45),  # in the step
        Allocation(6, 60, 5),  # before any phase
    ]
    spans = [curves.Span("forward", 10, 20), curves.Span("backward", 21, 40), curves.Span("AdamW", 42, 50)]
    marks = [(1, [Known(1, 10, "weights", "cpu")]), (35, [Known(4, 40, "gradients", "cpu"), Known(5, 1, "x", "cuda")])]
    curves.label(pieces, marks, spans, "cpu")
    assert [piece.category for piece in pieces] == [
        "weights", "unexplained", "activations", "workspace", "gradients", "workspace", "workspace",
    ]  # fmt: skip
    left = curves.new_gradients(pieces, 21, 46)
    assert [piece.address for piece in left] == [5]
    thin = thin_curve(curves.curve(pieces, 2), spans, [])
    assert max(map(sum, zip(*thin["categories"].values()))) == 10 + 20 + 30 + 40 + 50 + 60


def test_a_gradient_written_over_an_activation_is_one_until_then():
    activation, gradient = Allocation(1, 10, 15), Allocation(2, 20, 25)  # born in forward, in backward
    spans = [curves.Span("forward", 10, 20), curves.Span("backward", 21, 40)]
    waiting = [Known(1, 10, "workspace", "cpu"), Known(2, 20, "workspace", "cpu")]
    curves.label([activation, gradient], [(30, waiting)], spans, "cpu")
    assert (activation.category, gradient.category) == ("activations", "workspace")
    assert curves.new_gradients([activation, gradient], 21, 30) == []  # both are known: no weight gradients


def test_weights_that_stage_3_is_gathering_are_no_gradients():
    gathering = ("deepspeed/runtime/zero/partition_parameters.py:1343 _all_gather_dtype",)
    gathered, made = (
        Allocation(3, 30, 25, stack=gathering),
        Allocation(4, 40, 25, stack=("linear.py:9 backward",)),
    )
    assert curves.new_gradients([gathered, made], 21, 30) == [made]  # weights that no parameter has yet, in stage 3


def test_the_tracker_sees_births_and_deaths():
    weight = torch.ones(64, 64)
    with StorageTracker([weight]) as tracker:
        product = weight @ weight
        view = product.view(-1)
        weight.add_(1)
        assert tracker.live == product.nbytes
        del product, view
        assert tracker.live == 0
        twice = (weight + 1) + 2
    assert tracker.peak == 2 * weight.nbytes and twice.nbytes == tracker.live
    assert len(tracker.allocations) == 3 and "aten.mm.default -> (64, 64) float32" in tracker.allocations[0].stack[0]


MIB = 1 << 20


def test_the_caching_allocators_rules():
    allocator = CachingAllocator()
    small = [allocator.alloc(100), allocator.alloc(MIB)]
    assert (allocator.reserved, allocator.allocated) == (2 * MIB, MIB + 512)
    middle = allocator.alloc(3 * MIB)
    assert allocator.reserved == 22 * MIB
    large = allocator.alloc(30 * MIB + 1)
    assert allocator.reserved == (22 + 32) * MIB
    allocator.free(large)
    reused = allocator.alloc(5 * MIB), allocator.alloc(16 * MIB)  # from what is free of 20, and of 32
    assert allocator.reserved == (22 + 32) * MIB
    allocator.alloc(17 * MIB)  # 16 are left in one piece: that is what slack is
    assert allocator.reserved == (22 + 32 + 18) * MIB
    for handle in (*small, middle, *reused):
        allocator.free(handle)
    allocator.alloc(32 * MIB)  # freed neighbours have been joined
    assert allocator.reserved == (22 + 32 + 18) * MIB


def test_a_tensor_around_others_counts_as_those_and_a_sketched_gradient_as_nothing():
    model = torch.nn.Linear(6, 6)
    optimizer = ds_mofa.MoFaSGD(model, lr=1e-3, rank=2)
    model(torch.ones(1, 6)).sum().backward()
    with StorageTracker() as tracker:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # which scales all gradients in place
        inner = torch.ones(7)
        gathered = AsyncCollectiveTensor(inner).view(7, 1)
    assert type(model.weight.grad) is SketchedGradient and leaves(model.weight.grad) == []
    assert [leaf.data_ptr() for leaf in leaves({"state": [AsyncCollectiveTensor(inner)]})] == [inner.data_ptr()]
    sizes = [one.size for one in tracker.allocations]
    assert sizes.count(inner.nbytes) == 1 and model.weight.nbytes not in sizes
    assert gathered.shape == (7, 1)
    optimizer.detach()
