"""A state_dict that an earlier version saved still loads, and trains on as it did there."""

import sys
from pathlib import Path

import pytest
import torch

from ds_mofa import MoFaSGD

ROOT = Path(__file__).parents[2]
UNITS = {"lr": 1e-2, "adamw_lr": 1e-3, "adjust_lr_fn": "match_rms_adamw"}  # its rates are in


def test_it_goes_on_as_it_did(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "ranks")])
    from toys import Toy, batches

    saved = torch.load(ROOT / "fixtures" / "checkpoints" / "plain_explore.pt", weights_only=True)
    torch.manual_seed(1)
    model = Toy()
    settings = {"rank": 4, "weight_decay": 0.1, "adamw_eps": 1e-6, "explore": 2, "include": ["^blend$"]}
    optimizer = MoFaSGD(model, **UNITS, **settings)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    losses = []
    for batch in batches(6)[3:]:
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(saved["losses"], rel=1e-4)
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, saved["weights"][name], rtol=1e-3, atol=1e-4), name


def test_without_include_it_is_refused_with_the_way_out(monkeypatch):
    """Its bare matrix is AdamW's by default since then."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "ranks")])
    from toys import Toy

    saved = torch.load(ROOT / "fixtures" / "checkpoints" / "plain_explore.pt", weights_only=True)
    optimizer = MoFaSGD(Toy(), **UNITS, rank=4, explore=2)
    with pytest.raises(
        ValueError,
        match="of no known linear map, which earlier versions took for a matrix, is one where include names it",
    ):
        optimizer.load_state_dict(saved["optimizer"])


def test_its_rates_are_told_from_adamws(monkeypatch):
    """A state brings the rates that it was saved with, and these would make steps five times as long."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "ranks")])
    from toys import Toy

    saved = torch.load(ROOT / "fixtures" / "checkpoints" / "plain_explore.pt", weights_only=True)
    model = Toy()
    optimizer = MoFaSGD(model, lr=2e-3, rank=4, explore=2, include=["^blend$"])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the checkpoint's lr=0\.01 is far above.*adjust_lr_fn=\"match_rms_adamw\""):
        optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.matrices.steps == 0 and optimizer.param_groups[0]["lr"] == 2e-3
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
