"""Tiles of the Triton kernels within the shared memory of the cards that people have."""

import pytest
import torch

import ds_mofa.kernels as kernels
from ds_mofa.kernels import stages_that_fit, tile_that_fits

CARDS = {"H100": 232448, "A100": 166912, "RTX 4090": 101376}
DEVICE = torch.device("cpu")


def needs(width: int):
    return lambda rows, columns: (rows + columns) * width


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("width", [32, 256, 512, 1024, 2048])
def test_the_tile_is_the_largest_that_fits(monkeypatch, card, width):
    monkeypatch.setattr(kernels, "_shared_memory", lambda device: CARDS[card])
    rows, columns = tile_that_fits(DEVICE, (32, 256), needs(width))
    assert (rows + columns) * width <= CARDS[card]
    assert columns == 256 or (rows + 2 * columns) * width > CARDS[card], "twice as wide would not"


def test_one_that_has_run_keeps_its_tile(monkeypatch):
    monkeypatch.setattr(kernels, "_shared_memory", lambda device: CARDS["H100"])
    assert tile_that_fits(DEVICE, (32, 256), needs(128 * 4)) == (32, 256)
    # 256 fp32 columns, r = 8 with explore 120, asked for 294,912 bytes.
    assert tile_that_fits(DEVICE, (32, 256), needs(256 * 4)) == (32, 128)


def test_what_no_tile_holds_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "_shared_memory", lambda device: CARDS["RTX 4090"])
    with pytest.raises(ValueError, match="Lower explore or rank"):
        tile_that_fits(DEVICE, (32, 256), needs(4096))


def test_a_stage_at_least(monkeypatch):
    monkeypatch.setattr(kernels, "_shared_memory", lambda device: 1000)
    assert [stages_that_fit(DEVICE, size, other=200) for size in (100, 250, 900)] == [4, 3, 1]
