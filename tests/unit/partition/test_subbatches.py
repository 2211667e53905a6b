"""The factor update in sub-batches: every matrix once, within the bound on the temporaries, and in few batches."""

import functools
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_mofa import MoFaSGD
from ds_mofa.linalg.factors import Factors, gram_matrices, start_factors, update_many
from ds_mofa.options import Options
from ds_mofa.partition.layout import Layout
from ds_mofa.partition.subbatches import Part, split, temporaries
from ds_mofa.step import step
from tests.live_bytes import LiveBytes

LLAMA_8B = 32 * [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
DEFAULT = Options().update_bytes


def _blocks(shapes, rank):
    return Layout([(shape, 0) for shape in shapes], rank, 1).blocks


SHAPES = st.lists(st.sampled_from([(3, 5), (40, 7), (7, 40), (16, 16)]), max_size=20)


@settings(max_examples=150)
@given(shapes=SHAPES, rank=st.integers(1, 9), limit=st.floats(1, 1e5))
def test_every_matrix_is_in_one_sub_batch_and_none_is_too_large(shapes, rank, limit):
    blocks = _blocks(shapes, rank)
    batches = split(blocks, limit)
    members = [index for parts in batches for part in parts for index in part.numbers().tolist()]
    assert members == [index for block in blocks for index in block.members]
    for parts in batches:
        assert parts and all(part.first < part.last for part in parts)
        alone = len(parts) == 1 and parts[0].count == 1
        assert temporaries(parts) <= limit or alone
    for parts, after in itertools.pairwise(batches):  # a matrix more would have been too much
        block, first = after[0].block, after[0].first
        begun = [part for part in parts if part.block is block]
        others = [part for part in parts if part.block is not block]
        assert temporaries([*others, Part(block, begun[0].first if begun else first, first + 1)]) > limit


def test_a_part_is_its_members_of_the_block():
    [block] = _blocks([(4, 3)] * 5, 2)
    flat = torch.arange(block.numel).float()
    part = Part(block, 1, 3)
    assert part.numbers().tolist() == [1, 2]
    for view, whole in zip(part.views(flat), block.views(flat)):
        assert torch.equal(view, whole[1:3]) and view.is_contiguous()


def test_a_llama_of_8b_is_one_batch_on_one_gpu_and_its_split_a_matter_of_the_bound():
    blocks = _blocks(LLAMA_8B, 32)
    assert len(split(blocks, DEFAULT)) == 1
    assert temporaries(split(blocks, DEFAULT)[0]) < 1.6e9
    assert len(split(_blocks(LLAMA_8B, 128), DEFAULT)) <= 5
    assert all(temporaries(parts) <= 2e8 for parts in split(blocks, 2e8))


def test_so_is_one_that_explores_as_much_as_its_rank():
    blocks = _blocks(LLAMA_8B, 64)
    assert len(split(blocks, DEFAULT, functools.partial(temporaries, r=32))) == 1
    assert len(split(blocks, DEFAULT)) == 2, "the control: as if the state had the explored columns too"


def _batch(part):
    (m, n), r, B = part.block.shape, part.block.rank, part.last - part.first
    U, V = (torch.linalg.qr(torch.randn(B, size, r)).Q for size in (m, n))
    sigma = torch.rand(B, r).sort(-1, descending=True).values
    return Factors(U, sigma, V), torch.randn(B, m, r), torch.randn(B, n, r)


TALL = [(512, 128)] * 5 + [(128, 512)] * 3 + [(256, 256)] * 2


@pytest.mark.parametrize(
    ("shapes", "rank"),
    [
        (TALL, 4),
        (TALL, 32),
        ([(1024, 1024)] * 5 + [(1100, 1000)] * 5, 8),
        ([(200, 200)] * 6, 100),
        ([(64, 64)] * 9, 32),
        ([(40, 40)] * 9, 32),
        ([(2000, 30)] * 4, 8),
    ],
)
def test_the_update_needs_no_more_than_is_said(shapes, rank):
    torch.manual_seed(0)
    [parts] = split(_blocks(shapes, rank), 1e18)
    batches = [_batch(part) for part in parts]
    grams = [gram_matrices(*batch) for batch in batches]
    update_many(batches, beta=0.85, gamma=0.15, grams=grams)  # fills what is kept for good
    with LiveBytes() as live:
        update_many(batches, beta=0.85, gamma=0.15, grams=grams)
    said = temporaries(parts)
    assert 0.25 * said < live.peak <= said
    for part, batch in zip(parts, batches):
        _, Y, Z = batch
        with LiveBytes() as live:
            gram_matrices(*batch)
            start_factors(Y, Z, torch.randn_like(Y), gamma=0.15)
        assert live.peak <= temporaries([part])


def _trained(**options):
    torch.manual_seed(0)
    layers = [nn.Linear(96, 96, bias=False) for _ in range(6)] + [nn.Linear(96, 64), nn.LayerNorm(64)]
    model = nn.Sequential(*layers)
    optimizer = MoFaSGD(model, lr=2e-3, rank=8, **options)
    for _ in range(3):
        model(torch.randn(32, 96)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_a_step_in_many_sub_batches_is_the_step_in_one_to_rounding():
    one, together = _trained(diagnostics_every=3)
    many, apart = _trained(diagnostics_every=3, update_bytes=1)
    assert len(together.matrices.owner.sub_batches) == 1 and len(apart.matrices.owner.sub_batches) == 7
    for a, b in zip(one.parameters(), many.parameters()):
        assert (a - b).norm() <= 1e-5 * a.norm()
    assert torch.allclose(together.matrices.report.values, apart.matrices.report.values, rtol=1e-4, atol=1e-5)


def test_a_step_s_update_stays_within_the_bound():
    _, optimizer = _trained(update_bytes=200_000)
    step_of_matrices = optimizer.matrices
    assert 1 < len(step_of_matrices.owner.sub_batches) < 7
    step_of_matrices.sketches.normal_()
    step_of_matrices.reduce()
    with mock.patch.object(step, "write_wherever"), LiveBytes() as live:
        step_of_matrices.update(optimizer.matrix_groups)
    assert live.peak <= 200_000
    assert live.peak > 100_000
