"""The table of architectures is what it says: the shares of all, the training of one a family (of all: slow)."""

import pytest
import torch

from ds_mofa.capture.sketch import Sketch
from tests.architectures import ARCHITECTURES, FAILS
from tests.architectures_table import MODELS, REAL, SUPPORT, filled, percent, shares_of, shares_of_real, written
from tests.lessons import ENGINES, everything, lesson, still, verdict

QUICK = (
    "LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "GptOssForCausalLM", "MambaForCausalLM",
    "T5ForConditionalGeneration", "BertForMaskedLM",
    "ViTForImageClassification", "WhisperForConditionalGeneration", "Gemma3ForConditionalGeneration",
)  # fmt: skip
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES]
RENEW = "python tests/architectures_table.py --write renews it"


def test_the_table_has_a_row_of_each():
    table = written(SUPPORT)
    assert list(table) == list(ARCHITECTURES) and len(table) >= 45, RENEW
    assert {one.family for one in ARCHITECTURES.values()} == {ARCHITECTURES[name].family for name in QUICK}


def test_its_shares_are_those_of_the_split():
    """Control: a share that differs in its last figure is seen."""
    table = written(SUPPORT)
    stale = {name: (table[name][:2], found) for name in ARCHITECTURES if table[name][:2] != (found := shares_of(name))}
    assert not stale, RENEW
    assert percent(0.70899) != percent(0.70904) and percent(0.99996) == "99.9 %"


def test_what_does_not_train_is_known():
    """A row may not become a "no" by renewing the table alone."""
    columns = [engine for engine, _ in ENGINES]
    failed = {
        (name, engine): cell
        for name, cells in written(SUPPORT).items()
        for engine, cell in zip(columns, cells[2:], strict=True)
        if cell != "yes"
    }
    assert failed.keys() == FAILS.keys()
    for place, cell in failed.items():
        assert FAILS[place] in cell, place


@pytest.mark.parametrize("name", ALL)
def test_it_learns_in_one_process(name):
    assert verdict(lesson(ARCHITECTURES[name])) == written(SUPPORT)[name][2], RENEW


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_learns_with_embeddings_and_heads_for_matrices(name):
    one = ARCHITECTURES[name]
    assert verdict(lesson(one, include=everything(one))) == "yes"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in REAL[:3] else pytest.mark.slow) for name in REAL]
)
def test_the_shares_of_published_shapes_are_those_of_the_split(name):
    assert written(MODELS)[name] == shares_of_real(name), RENEW


def test_a_weight_that_no_gradient_reaches_is_seen(monkeypatch):
    """A control."""
    monkeypatch.setattr(Sketch, "add_linear", lambda self, x, dy: None)
    assert "is off by 1e+00" in verdict(lesson(ARCHITECTURES["LlamaForCausalLM"]))
    seen = lesson(ARCHITECTURES["LlamaForCausalLM"])
    assert "does not move" in verdict(seen._replace(error=None))


def test_one_expert_that_stays_is_seen():
    """A control; one without a gradient may stay."""
    before, after, grad = {"w": torch.zeros(3, 4, 5)}, {"w": torch.ones(3, 4, 5)}, {"w": torch.ones(3, 4, 5)}
    assert still(before, after, grad) == []
    after["w"][1] = 0
    assert still(before, after, grad) == ["w"]
    grad["w"][1] = 0
    assert still(before, after, grad) == []


def test_a_sketch_that_is_a_little_off_is_seen(monkeypatch):
    """A control."""
    add = Sketch.add_linear
    monkeypatch.setattr(Sketch, "add_linear", lambda self, x, dy: add(self, x, dy * 1.0001))
    assert "a sketch is off by 1e-04" in verdict(lesson(ARCHITECTURES["LlamaForCausalLM"]))


def test_steps_that_go_nowhere_are_seen():
    """A control: at this rate the matrices move, and the loss falls by AdamW's steps alone."""
    slow = lesson(ARCHITECTURES["LlamaForCausalLM"], lr=1e-6)
    assert verdict(slow) == "no: the loss does not fall"


def test_other_losses_are_seen():
    """A control."""
    alone = lesson(ARCHITECTURES["LlamaForCausalLM"])
    other = [loss * (1 + 2e-4 * step) for step, loss in enumerate(alone.losses)]
    assert verdict(alone, alone.losses, [], None) == "yes"
    assert verdict(alone, other, []) == "no: other losses than in one process"
    assert verdict(alone, error="ValueError: not here\nat all") == "no: `ValueError: not here`"


def test_the_table_keeps_what_stands_around_it(tmp_path):
    text = SUPPORT.read_text(encoding="utf-8")
    assert filled(SUPPORT, written(SUPPORT)) == text
    assert filled(SUPPORT, dict(list(written(SUPPORT).items())[1:])) != text
