"""The flat buffers: who owns which matrix, and that no two numbers share a place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_mofa.partition.exchange import Exchange
from ds_mofa.partition.layout import _ALIGNMENT, Layout

EXAMPLES = settings(max_examples=150)
SHAPE = st.tuples(st.integers(1, 40), st.integers(1, 40))
# Few different shapes, so that blocks of many matrices are common.
SHAPES = st.lists(SHAPE, min_size=1, max_size=5).flatmap(
    lambda few: st.lists(st.sampled_from(few), min_size=1, max_size=30)
)
LAYOUTS = {"shapes": SHAPES, "rank": st.integers(1, 9), "world_size": st.integers(1, 9)}


def _layout(shapes, rank, world_size):
    return Layout([(shape, 0) for shape in shapes], rank, world_size)


def _numel(shape, rank):
    return rank * (sum(shape) + 1)


@EXAMPLES
@given(**LAYOUTS)
def test_every_matrix_is_in_one_block_of_its_owner_and_shape(shapes, rank, world_size):
    layout = _layout(shapes, rank, world_size)
    assert sorted(index for block in layout.blocks for index in block.members) == list(range(len(shapes)))
    for block in layout.blocks:
        assert block.rank == rank
        assert all(shapes[index] == block.shape for index in block.members)
        assert all(layout.owners[index] == block.owner for index in block.members)
    assert [block for owner in range(world_size) for block in layout.owned_by(owner)] == layout.blocks
    # One batch a shape and owner: that is what makes the update one call a shape.
    keys = [(block.owner, block.shape) for block in layout.blocks]
    assert len(set(keys)) == len(keys)


@EXAMPLES
@given(**LAYOUTS)
def test_no_two_numbers_share_a_place_and_none_lies_outside_its_owner_s_segment(shapes, rank, world_size):
    layout = _layout(shapes, rank, world_size)
    assert layout.numel == layout.segment * world_size
    flat = torch.zeros(layout.numel)
    for index, (m, n) in enumerate(shapes):
        left, right, core = layout.views(flat, index)
        assert left.shape == (m, rank) and right.shape == (n, rank) and core.shape == (rank,)
        for view in (left, right, core):
            view += index + 1
    for index, shape in enumerate(shapes):
        places = (flat == index + 1).nonzero()
        assert len(places) == _numel(shape, rank)  # added to twice it would be another number
        owner = layout.owners[index]
        assert owner * layout.segment <= places.min() and places.max() < (owner + 1) * layout.segment
    assert int((flat == 0).sum()) == layout.numel - sum(_numel(shape, rank) for shape in shapes)


@EXAMPLES
@given(**LAYOUTS)
def test_segments_and_blocks_are_aligned(shapes, rank, world_size):
    layout = _layout(shapes, rank, world_size)
    assert layout.segment % _ALIGNMENT == 0
    assert all(block.offset % _ALIGNMENT == 0 for block in layout.blocks)


@EXAMPLES
@given(**LAYOUTS)
def test_owners_are_balanced(shapes, rank, world_size):
    """Longest first: two owners differ by one matrix at most, so padding is less than one plus the alignment."""
    layout = _layout(shapes, rank, world_size)
    loads = [sum(sum(shapes[i]) for i, o in enumerate(layout.owners) if o == owner) for owner in range(world_size)]
    assert max(loads) - min(loads) <= max(map(sum, shapes))
    # Before the fullest owner got its last and smallest, it had the least of all.
    fullest = loads.index(max(loads))
    smallest = min(sum(shapes[i]) for i, owner in enumerate(layout.owners) if owner == fullest)
    assert max(loads) - smallest <= sum(loads) / world_size
    blocks = max(len(layout.owned_by(owner)) for owner in range(world_size))
    most = max(len([o for o in layout.owners if o == owner]) for owner in range(world_size))
    assert layout.segment <= rank * (max(loads) + most) + blocks * _ALIGNMENT


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 16])
def test_a_llama_is_shared_out_within_five_percent(world_size):
    layer = [(64, 64), (16, 64), (16, 64), (64, 64), (224, 64), (224, 64), (64, 224)]
    layout = _layout(layer * 32, 8, world_size)
    assert layout.numel <= 1.05 * sum(_numel(shape, 8) for shape in layer * 32)


@EXAMPLES
@given(**LAYOUTS)
def test_a_layout_follows_from_its_arguments_alone(shapes, rank, world_size):
    torch.manual_seed(0)
    one = _layout(shapes, rank, world_size)
    torch.manual_seed(1)
    other = _layout(tuple(map(tuple, shapes)), rank, world_size)
    assert one.blocks == other.blocks and one.owners == other.owners and one.numel == other.numel


def test_more_ranks_than_matrices_leaves_owners_without_any():
    layout = _layout([(6, 4), (3, 5)], 2, 5)
    owned = [layout.owned_by(owner) for owner in range(5)]
    assert sorted(map(len, owned)) == [0, 0, 0, 1, 1]
    assert layout.segment == _ALIGNMENT and layout.numel == 5 * _ALIGNMENT


@EXAMPLES
@given(**LAYOUTS)
def test_block_views_of_a_segment_are_the_matrices_views_of_the_whole(shapes, rank, world_size):
    layout = _layout(shapes, rank, world_size)
    whole = torch.arange(layout.numel)
    for owner in range(world_size):
        start = owner * layout.segment
        segment = whole.narrow(0, start, layout.segment).clone()
        for block in layout.owned_by(owner):
            of_segment, of_whole = block.views(segment, start), block.views(whole)
            assert all(map(torch.equal, of_segment, of_whole))
            assert sum(view.numel() for view in of_whole) == block.numel
            for i, index in enumerate(block.members):
                assert all(map(torch.equal, (view[i] for view in of_segment), layout.views(whole, index)))


def test_views_are_views():
    layout = _layout([(3, 4), (3, 4)], 2, 1)
    flat = torch.zeros(layout.numel)
    for view in layout.blocks[0].views(flat):
        assert view.is_contiguous()
        view.fill_(1)
    assert flat.sum() == 2 * _numel((3, 4), 2)


def test_one_process_alone_needs_no_group():
    exchange = Exchange()
    values = torch.tensor([1.0, 2.0])
    assert (exchange.rank, exchange.world_size, exchange.mean_scale) == (0, 1, 1.0)
    reduced = exchange.reduce_scatter(values, 2)
    assert torch.equal(reduced, values) and reduced.data_ptr() != values.data_ptr()
    exchange.all_gather(values, 2)
    exchange.broadcast(values, 0)
    assert torch.equal(exchange.sum(values), torch.tensor([1.0, 2.0]))


def test_matrices_of_two_param_groups_share_no_block():
    """A block is written with one learning rate."""
    layout = Layout([((3, 4), 0), ((3, 4), 1), ((3, 4), 0)], 2, 1)
    assert [(block.group, block.members) for block in layout.blocks] == [(0, (0, 2)), (1, (1,))]
