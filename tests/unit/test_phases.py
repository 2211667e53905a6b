"""Phases: told in order, nested, and to nobody when nobody listens."""

import pytest
import torch
from torch import nn

import ds_mofa
from ds_mofa.phases import listening, phase


class Recorder:
    def __init__(self):
        self.heard = []

    def enter(self, name):
        self.heard.append(f"+{name}")

    def leave(self, name):
        self.heard.append(f"-{name}")


def test_a_step_names_its_parts():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    optimizer = ds_mofa.MoFaSGD(model, lr=1e-3, rank=2)
    recorder = Recorder()
    with listening(recorder):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    names = ["capture", "reduce", "AdamW", "factor update", "gather", "apply"]
    assert recorder.heard == [sign + name for name in names for sign in "+-"]


def test_silence_outside():
    recorder = Recorder()
    with listening(recorder):
        pass
    with phase("apply"):
        pass
    assert recorder.heard == []


def test_an_error_still_ends_the_phase():
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError), listening(recorder), phase("apply"):
        raise ZeroDivisionError
    assert recorder.heard == ["+apply", "-apply"]
