"""Micro-batches as CUDA graphs: the eager run, whatever becomes of ``.grad`` between steps."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from ds_mofa import GraphedMicroBatch, MoFaSGD
from tests.gpu.toys import MICRO_BATCHES, STEPS, TOKENS, Model, mofasgd

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def batches(tokens=TOKENS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(100, (2, tokens), generator=generator).cuda() for _ in range(MICRO_BATCHES)]


def run(
    make, *, graphed: bool, dtype=torch.bfloat16, set_to_none=True, lengths=(TOKENS,) * STEPS, compiled: bool = False
):
    torch.manual_seed(0)
    model = Model().to("cuda", dtype)
    optimizer, forward = make(model), torch.compile(model) if compiled else model
    micro_batch = micro_batch_of(forward, optimizer)
    losses = []
    for tokens in lengths:
        for ids in batches(tokens):
            if graphed:
                losses.append(micro_batch(ids, MICRO_BATCHES))
            else:
                loss = forward(ids) / MICRO_BATCHES
                loss.backward()
                losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return torch.stack(losses).tolist(), model.state_dict(), micro_batch


MAKES = {
    "rank 8": mofasgd(),
    "explore": mofasgd(explore=8),
    "hook": mofasgd(capture="hook"),
    "embedding, head": mofasgd(include=["embed", "head.weight"]),
    "int8": mofasgd(weights="int8"),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_it_is_the_eager_run(make, set_to_none):
    expected, weights, _ = run(make, graphed=False, set_to_none=set_to_none)
    losses, found, micro_batch = run(make, graphed=True, set_to_none=set_to_none)
    assert len(micro_batch._graphs) == 1
    assert losses == pytest.approx(expected, rel=2e-3)
    assert losses[-1] < 0.9 * losses[0]
    for name, weight in weights.items():
        torch.testing.assert_close(found[name].float(), weight.float(), rtol=0.02, atol=2e-3)


def test_larger_shapes_let_go_of_the_smaller_ones_graphs():
    """The run is the eager one, and takes little more than the largest shape alone."""
    lengths, reserved = (128, 128, 256, 256, 512, 512, 512, 128, 256, 512), {}
    expected, _, _ = run(mofasgd(), graphed=False, lengths=lengths)
    for name, some in (("all", lengths), ("largest", (512,) * 5)):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        losses, _, micro_batch = run(mofasgd(), graphed=True, lengths=some)
        reserved[name] = torch.cuda.memory_reserved() - before
        assert len(micro_batch._graphs) == (3 if name == "all" else 1)
        if name == "all":
            assert losses == pytest.approx(expected, rel=5e-3)
        del micro_batch
    assert reserved["all"] < 1.2 * reserved["largest"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mixture_of_experts_is_captured(checkpointing):
    """transformers' router and our grouped products wait for nothing."""
    config = AutoConfig.for_model(**json.loads(Path("configs/models/qwen3-moe-tiny.json").read_text()))
    found = {}
    for graphed in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        optimizer = mofasgd()(model)
        micro_batch = GraphedMicroBatch(lambda ids, model=model: model(input_ids=ids, labels=ids).loss, optimizer)
        if not graphed:
            micro_batch.WARM = 1000
        losses = []
        for _ in range(8):
            losses.append(micro_batch(batches()[0]))
            optimizer.step()
            optimizer.zero_grad()
        found[graphed] = torch.stack(losses).tolist()
        assert len(micro_batch._graphs) == graphed
    assert found[True] == pytest.approx(found[False], rel=0.01)
    assert found[True][-1] < 0.95 * found[True][0]


def micro_batch_of(model, optimizer):
    return GraphedMicroBatch(lambda ids, count: model(ids) / count, optimizer)


def built(make, *, graphed: bool):
    """In fp32: a model, its optimizer and a micro-batch, which runs eagerly for ever where it is not to be a graph."""
    torch.manual_seed(0)
    model = Model().cuda()
    optimizer = make(model)
    micro_batch = micro_batch_of(model, optimizer)
    if not graphed:
        micro_batch.WARM = 1000
    return model, optimizer, micro_batch


def steps(optimizer, micro_batch, model, count, norms):
    """Some of a run's, with a norm that is clipped far below its own."""
    for _ in range(count):
        for ids in batches():
            micro_batch(ids, MICRO_BATCHES)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"explore": 8}, {"explore": 8, "balance": 0.5}, {"rank": 40}], ids=str)
def test_norm_and_update_are_graphs_too(options):
    """Through a loaded state and reports, until the graphs are gone, and after."""
    found = {}
    for graphed in (False, True):
        model, optimizer, micro_batch = built(mofasgd(diagnostics_every=4, **options), graphed=graphed)
        reports, norms = [], []
        optimizer.matrices.on_report = reports.append
        steps(optimizer, micro_batch, model, 5, norms)
        update = micro_batch._update
        assert (update is not None and update._norm is not None and update._update is not None) == graphed
        state = copy.deepcopy(optimizer.state_dict())
        steps(optimizer, micro_batch, model, 2, norms)
        optimizer.load_state_dict(state)
        steps(optimizer, micro_batch, model, 3, norms)
        del micro_batch, update
        assert optimizer.matrices._graphs() is None
        steps(optimizer, micro_batch_of(model, optimizer), model, 1, norms)
        reported = torch.stack([report.values for report in reports])
        found[graphed] = torch.stack(norms), reported, [param.detach() for param in model.parameters()]
    (norms, reports, weights), (expected, others, before) = found[True], found[False]
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reports, others, rtol=1e-3, atol=1e-4)
    for weight, other in zip(weights, before, strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)


def test_a_norm_between_micro_batches_leaves_out_none():
    """What is replayed after it belongs to the same step, and what a model's own zero_grad drops to none."""
    found = {}
    for graphed in (False, True):
        model, optimizer, micro_batch = built(MAKES["explore"], graphed=graphed)
        for step in range(STEPS):
            if step % 3 == 2:
                micro_batch(batches()[0], MICRO_BATCHES)
                model.zero_grad()
            for ids in batches():
                micro_batch(ids, MICRO_BATCHES)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            optimizer.step()
            optimizer.zero_grad()
        found[graphed] = [param.detach() for param in model.parameters()]
    for weight, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)


def test_fp32_is_the_eager_run_to_its_rounding():
    expected, weights, _ = run(MAKES["explore"], graphed=False, dtype=torch.float32)
    losses, found, _ = run(MAKES["explore"], graphed=True, dtype=torch.float32)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)


def test_checkpointed_it_is_the_eager_run(monkeypatch):
    """As Hugging Face's models do, but for the random state, which cannot be captured."""
    plain = Model.forward

    def forward(self, ids):
        how = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(lambda tokens: plain(self, tokens), ids, **how)

    monkeypatch.setattr(Model, "forward", forward)
    expected, _, _ = run(MAKES["rank 8"], graphed=False)
    losses, _, micro_batch = run(MAKES["rank 8"], graphed=True)
    assert len(micro_batch._graphs) == 1
    assert losses == pytest.approx(expected, rel=2e-3)


def test_a_compiled_model_in_a_graph_is_the_compiled_run():
    """What the compiler has fused, and no host that launches it."""
    expected, _, without = run(MAKES["explore"], graphed=False, compiled=True)
    losses, _, micro_batch = run(MAKES["explore"], graphed=True, compiled=True)
    assert (len(without._graphs), len(micro_batch._graphs)) == (0, 1)
    assert losses == pytest.approx(expected, rel=2e-3)


def test_each_shape_has_a_graph():
    lengths = [TOKENS, 64, 64, TOKENS, 64, TOKENS, 64, 96]
    expected, _, _ = run(MAKES["explore"], graphed=False, lengths=lengths)
    losses, _, micro_batch = run(MAKES["explore"], graphed=True, lengths=lengths)
    assert losses == pytest.approx(expected, rel=2e-3)
    assert len(micro_batch._graphs) == 2, "three calls are too few for the last one"


def test_weights_that_lie_elsewhere_are_found():
    """Graphs of the old memory would train what nobody reads, and count one micro-batch of a step alone."""
    weights = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = Model().cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        micro_batch = GraphedMicroBatch(lambda ids: model(ids), optimizer)
        for step in range(STEPS):
            if step == 3:
                for param in model.parameters():
                    param.data = param.data.clone()
            for ids in batches():
                micro_batch(ids) if graphed else model(ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5)


def test_what_waits_for_the_device_is_refused():
    model = Model().cuda()
    optimizer = MoFaSGD(model, lr=1e-3, rank=8)

    def waits(ids):
        loss = model(ids)
        return loss * (loss.item() > 0)

    micro_batch = GraphedMicroBatch(waits, optimizer)
    for _ in range(GraphedMicroBatch.WARM):
        micro_batch(batches()[0])
    with pytest.raises(RuntimeError, match="waits for the device"):
        micro_batch(batches()[0])


def test_a_step_is_refused():
    model = Model().cuda()
    optimizer = MoFaSGD(model, lr=1e-3, rank=8)

    def steps(ids):
        optimizer.step()
        return model(ids)

    micro_batch = GraphedMicroBatch(steps, optimizer)
    for _ in range(GraphedMicroBatch.WARM):
        micro_batch(batches()[0])
    with pytest.raises(RuntimeError) as caught:
        micro_batch(batches()[0])
    assert "a step cannot be captured" in str(caught.value.__cause__)


def test_the_host_launches_once():
    model = Model().to("cuda", torch.bfloat16)
    micro_batch = GraphedMicroBatch(model, MoFaSGD(model, lr=1e-3, rank=8))
    ids = batches()[0]
    for _ in range(GraphedMicroBatch.WARM + 1):
        micro_batch(ids)
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        micro_batch(ids)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert sum(name == "cudaGraphLaunch" for name in names) == 1
    assert not any(name.startswith(("aten::mm", "aten::addmm", "aten::linear")) for name in names)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_with_graphs_of_its_own_is_the_eager_run(mode):
    """torch.compile captures forward and backward by itself, where it can."""
    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Model().to("cuda", torch.bfloat16)
        optimizer = MoFaSGD(model, lr=1e-3, rank=8)
        forward = torch.compile(model, mode=mode) if compiled else model
        losses[compiled] = []
        for _ in range(STEPS):
            for ids in batches():
                if compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                loss = forward(ids) / MICRO_BATCHES
                loss.backward()
                losses[compiled].append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[True] == pytest.approx(losses[False], rel=5e-3)
