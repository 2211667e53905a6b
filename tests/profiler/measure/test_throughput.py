"""Tokens, seconds and joules of steps, against numbers written by hand."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ds_mofa.profiler import MemoryProfiler, load_report
from ds_mofa.profiler.measure.flops import flops_per_token
from ds_mofa.profiler.measure.nvml import NvmlReader
from ds_mofa.profiler.measure.sampler import Sampler
from ds_mofa.profiler.measure.throughput import Throughput
from tests.profiler.measure.fake_nvml import FakeNvml

SHAPE = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


def steps(readings, shapes, seconds, counted, model=None):
    """A watched model after steps of one forward each."""
    readings = iter(readings)
    throughput = Throughput(lambda: next(readings))
    model = nn.Embedding(64, 4) if model is None else model
    throughput.watch(model)
    for shape, took, one in zip(shapes, seconds, counted, strict=True):
        model(torch.zeros(shape, dtype=torch.long))
        throughput.step(took, one)
    return throughput, model


def test_by_hand():
    """The third step, which is recorded, is long and hungry, and counts for nothing."""
    readings, shapes = [10.0, 14.0, 20.0, 900.0, 905.0], [(2, 8), (1, 32), (9, 64), (2, 16)]
    found, model = steps(readings, shapes, [2.0, 1.0, 50.0, 2.0], [True, True, False, True])
    assert found.report(model, "NVIDIA H100") == {
        "tokens_per_step": 32, "tokens_per_second": 16.0, "mfu": None, "joules": 15.0, "tokens_per_joule": 80 / 15,
    }  # fmt: skip
    assert found.shape == (9, 64)


def test_the_utilisation_is_that_of_the_card():
    model = LlamaForCausalLM(SHAPE)
    found, _ = steps([None] * 3, [(1, 16), (1, 16)], [1.0, 1.0], [True, True], model)
    share = flops_per_token(model, 16) * 16 / 989e12
    wrapped = nn.Module()
    wrapped.module = model
    for one in (model, wrapped):
        assert found.report(one, "NVIDIA H100 80GB HBM3")["mfu"] == pytest.approx(share, rel=1e-12)
    assert found.report(model, "CPU")["mfu"] is None and found.report(None, "NVIDIA H100")["mfu"] is None
    assert found.report(model, "NVIDIA H100")["joules"] is None


def test_what_is_not_trained_on_is_not_counted():
    found, model = steps([None] * 3, [(1, 16)], [1.0], [True])
    with torch.no_grad():
        model(torch.zeros(4, 64, dtype=torch.long))
    found.step(1.0, True)
    assert found.report(model, "")["tokens_per_step"] == 8 and found.shape == (1, 16)
    nothing = Throughput(lambda: None)
    linear = nn.Linear(4, 4)
    undo = nothing.watch(linear)
    linear(torch.zeros(2, 4))
    nothing.step(1.0, True)
    assert set(nothing.report(linear, "").values()) == {None}, "a model without tokens"
    undo()
    assert not linear._forward_pre_hooks


def test_energy_by_the_driver():
    driver = FakeNvml({0: 100})
    driver.millijoules = 2500
    reader = NvmlReader([0], driver)
    sampler = Sampler(reader)
    assert sampler.joules(0) == 2.5 and sampler.joules(1) is None
    driver.counts_energy = False
    assert sampler.joules(0) is None and sampler.joules(0) is None
    assert reader.problems == ["NVML: device 0 does not count its energy (Not Supported); no tokens per joule"]
    assert reader.read()[0] == {0: 101}, "its memory is read all the same"


def test_a_run_has_its_tokens(tmp_path):
    with MemoryProfiler(output_dir=tmp_path) as profiler:
        model = LlamaForCausalLM(SHAPE)
        profiler.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(3):
            for _ in range(2):
                ids = torch.zeros(2, 8, dtype=torch.long)
                model(input_ids=ids, labels=ids).loss.backward()
            profiler.step()
    (rank,) = load_report(tmp_path / "report.json")["ranks"]
    seconds = rank["step_seconds"]
    assert rank["throughput"]["tokens_per_step"] == 32
    assert rank["throughput"]["tokens_per_second"] == pytest.approx(sum(32 / s for s in seconds) / 2)
    assert rank["throughput"]["mfu"] is None and "tokens/s of a rank" in (tmp_path / "report.md").read_text()
