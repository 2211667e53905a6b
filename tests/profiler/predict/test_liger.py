"""The stand-ins for liger-kernel: the model's own numbers, and in bytes what was measured with the real kernels."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_mofa.profiler.predict import PredictionError, predict
from ds_mofa.profiler.predict.simulated import liger
from ds_mofa.profiler.predict.simulated.micro_batch import simulate
from ds_mofa.profiler.setting import RunSetting
from ds_mofa.profiler.storages import StorageTracker

ROOT = Path(__file__).resolve().parents[3]
LLAMA = str(ROOT / "configs/models/llama-3.1-8b.json")
SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "use_cache": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}


def gradients(model, ids, labels) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels).loss
    (loss * 0.5).backward()  # as with two micro-batches
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", [*liger.MODELS, *liger.WITH_EXPERTS])
def test_loss_and_gradients_are_the_models_own(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SHAPE, **(EXPERTS if kind in liger.WITH_EXPERTS else {}))
    ).train()
    for p in model.parameters():  # norms of ones and biases of zeros would hide what is left out
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(96, (2, 24))
    labels = ids.clone()
    labels[0, 5:9] = -100
    expected, own = gradients(model, ids, labels)
    with liger.fused(model):
        loss, found = gradients(model, ids, labels)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in own.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: {error}"
    assert gradients(model, ids, labels)[0] == expected  # and afterwards everything is as it was


def saved_bytes(function, *inputs) -> int:
    """Of the storages that ``function`` keeps for backward, its weights apart, each once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return sum(kept.values())


def test_what_each_operator_keeps():
    tokens, width, vocabulary = 64, 32, 96
    x = torch.randn(2, tokens // 2, width, requires_grad=True)
    gate, up = (torch.randn(tokens, width, requires_grad=True) for _ in range(2))
    weight, head = torch.randn(width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    assert saved_bytes(liger._RMSNorm.apply, x, weight, 1e-6) == 4 * (tokens * width + tokens + width)
    assert saved_bytes(liger._SwiGLU.apply, gate, up) == 4 * 2 * tokens * width
    # Not the logits, nor the input: both gradients.
    kept = saved_bytes(liger._LinearCrossEntropy.apply, x.view(-1, width), head, targets)
    assert kept == 4 * (tokens * width + vocabulary * width)
    kept = saved_bytes(liger._LinearCrossEntropy.apply, x.view(-1, width), head.detach(), targets)
    assert kept == 4 * tokens * width  # a frozen head needs none


def test_backward_writes_over_what_is_there():
    gate, up = (torch.randn(64, 32, requires_grad=True).clone() for _ in range(2))
    out = liger._SwiGLU.apply(gate, up)
    passed_on = torch.ones_like(out)
    with StorageTracker([gate, up, out, passed_on]) as tracker:
        dgate, dup = torch.autograd.grad(out, (gate, up), passed_on)
    assert tracker.peak == 0  # HF's own would allocate three of that size
    assert (dgate.data_ptr(), dup.data_ptr()) == (gate.data_ptr(), up.data_ptr())


def test_logits_exist_for_a_few_tokens_at_a_time():
    # Llama-3.1-8B: 128256 / 4096 parts of 1024 tokens.
    assert liger._chunk(1024, 4096, 128256) == 32 and liger._chunk(4096, 4096, 128256) == 128
    assert liger._chunk(10, 4096, 128256) == 1 and liger._chunk(10, 4096, 4096) == 10


def measured() -> dict:
    lines = (ROOT / "profiling/results/benchmarks/memory_llama-3.1-8b_1xH200_2026-11-22.jsonl").read_text().splitlines()
    return next(row for row in map(json.loads, lines) if row["run"] == "torch:MoFaSGD:r=8:liger=1")


def test_the_peak_is_what_was_measured():
    row, found = measured(), predict(RunSetting.of(LLAMA, "MoFaSGD", liger=True))
    assert found["allocated"] == pytest.approx(row["peak_allocated"], rel=0.001)
    assert found["total"] == pytest.approx(row["nvml"], rel=0.02)
    assert found["allocated"] < 29e9 < predict(RunSetting.of(LLAMA, "MoFaSGD"))["allocated"]
    own = {name: found["categories"][name] for name in ("weights", "gradients", "AdamW states", "factors", "sketches")}
    assert own == pytest.approx({name: row["breakdown"][name] for name in own}, rel=1e-4)


def test_each_phase_is_what_was_measured():
    phases = measured()["phases"]
    batch = simulate(RunSetting.of(LLAMA, "MoFaSGD", rank=8, liger=True))
    # Storages of forward in which backward has put a gradient count there as workspace: the sum is compared.
    forward, backward = (phases[name]["activations"] + phases[name]["workspace"] for name in ("forward", "backward"))
    assert batch.peaks[0].activations + batch.peaks[0].workspace == pytest.approx(forward, rel=1e-4)
    # Backward begins without the hidden state and the chunk of logits, with the head's gradient in activations.
    head = 2 * 128256 * 4096
    first = batch.at_completion[0]
    assert batch.order[0] == "lm_head.weight"
    assert first.activations + first.workspace + head == pytest.approx(backward, rel=1e-3)


def test_models_whose_operators_are_not_known(tmp_path):
    shape = {"model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 64, "vocab_size": 96}  # fmt: skip
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(shape))
    with pytest.raises(PredictionError, match='type "gpt_neox" and AdamW cannot be predicted.*known of llama'):
        simulate(RunSetting.of(str(path), "AdamW", liger=True))


def test_experts_are_left_to_an_optimizer_that_captures_them(tmp_path):
    """liger-kernel's own, beside AdamW, are not known."""
    config = AutoConfig.for_model("qwen3_moe", **SHAPE, **EXPERTS)
    path = tmp_path / "shape.json"
    path.write_text(config.to_json_string(use_diff=False))
    words = {"seq": 64, "liger": True}
    assert simulate(RunSetting.of(str(path), "MoFaSGD", **words)).peaks
    with pytest.raises(PredictionError, match='type "qwen3_moe" and AdamW cannot be predicted'):
        simulate(RunSetting.of(str(path), "AdamW", **words))


@pytest.mark.slow  # 48 layers
def test_what_a_mixture_of_experts_took_is_predicted():
    """The committed runs of Qwen3-30B-A3B with these operators, on one H200."""
    file = ROOT / "profiling/results/benchmarks/moe-graphed_qwen3-30b-a3b_1xH200_2026-11-27.jsonl"
    rows = [row for row in map(json.loads, file.read_text().splitlines()) if "liger=1" in row["run"]]
    assert len(rows) == 3
    for row in rows:
        config = str(ROOT / f"configs/models/{row['model']}.json")
        setting = RunSetting.parse(row["run"], shape=row["shape"], model_config=config)
        assert predict(setting)["total"] / 1e9 == pytest.approx(row["nvml_gb"], rel=0.1)
