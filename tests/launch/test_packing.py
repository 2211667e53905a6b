"""Packing is refused for the models that let packed examples see each other, and for those alone."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    Qwen3MoeConfig,
    RwkvConfig,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from launch.models import config_from_shape
from launch.packing import _layers, _prefix_with_all_kinds, measure, miniature, packing_problem

CPU = torch.device("cpu")
COLLATOR = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
MOST = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}

# (config, whether packed examples are kept apart)
FAMILIES = {
    "LLaMA": (LlamaConfig(**MOST), True),
    "Gemma 2": (Gemma2Config(**MOST, head_dim=8), True),
    "Gemma 3, which sees": (
        Gemma3Config(
            text_config=MOST | {"head_dim": 8, "num_hidden_layers": 7},
            vision_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=7, num_attention_heads=2,
                               image_size=28, patch_size=14),
        ),
        True,
    ),
    "GPT-2": (GPT2Config(vocab_size=99, n_embd=32, n_layer=4, n_head=4), True),
    "Qwen3-MoE": (
        Qwen3MoeConfig(**MOST, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        True,
    ),
    "DeepSeek-V3": (
        DeepseekV3Config(
            **SIZES, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1,
            num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
            first_k_dense_replace=1,
        ),
        True,
    ),
    "OPT": (OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32), False),
    "BLOOM": (BloomConfig(vocab_size=99, hidden_size=32, n_layer=4, n_head=4), False),
    "MPT": (MptConfig(vocab_size=99, d_model=32, n_layers=4, n_heads=4), False),
    "Mamba": (MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=4, state_size=4), False),
    "Falcon, alibi": (FalconConfig(**SIZES, alibi=True), False),
    "GPT-OSS": (GptOssConfig(**MOST, head_dim=8, num_local_experts=4), False),
    "RWKV": (RwkvConfig(vocab_size=99, hidden_size=32, num_hidden_layers=4), False),
    "LFM2, convolutions": (
        Lfm2Config(**MOST, layer_types=["full_attention", "conv", "full_attention", "full_attention"]),
        False,
    ),
    "Jamba": (
        JambaConfig(**(MOST | {"num_hidden_layers": 8}), num_experts=2, use_mamba_kernels=False),
        False,
    ),
}  # fmt: skip


def model_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def change_of_the_second(model) -> float:
    """What the second example's logits change by when the first one's tokens do: what a leak is."""
    logits = []
    for start in (1, 2):
        ids = list(range(start, start + 8)) + list(range(20, 28))
        batch = COLLATOR([{"input_ids": ids, "labels": ids, "seq_lengths": [8, 8]}])
        batch.pop("labels")
        with torch.no_grad():
            logits.append(model.eval()(**batch, use_cache=False).logits[0, 8:])
    return (logits[0] - logits[1]).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_refused_where_examples_see_each_other(family):
    config, apart = FAMILIES[family]
    model = model_of(config)
    assert (change_of_the_second(model) < 1e-6) == apart  # the whole model's, in fp32
    problem = packing_problem(model, COLLATOR, CPU)
    assert (problem is None) == apart
    if not apart:
        assert f"{type(model).__name__} (attention: " in problem and "Leave out --packing" in problem


@pytest.mark.parametrize("family", ["LLaMA", "Qwen3-MoE", "OPT", "LFM2, convolutions"])
def test_the_measure_is_exact_in_16_bits_too(family):
    config, apart = FAMILIES[family]
    own, leak = measure(miniature(model_of(config, torch.bfloat16), CPU), COLLATOR)
    assert own > 0 and (leak == 0) == apart


def test_without_the_collator_s_positions_every_model_leaks():
    """What the measure says yes to is the batches as they will come, not the model alone."""
    assert packing_problem(model_of(FAMILIES["LLaMA"][0]), DataCollatorForLanguageModeling(pad_token_id=0), CPU)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("LLaMA", 1),
        ("Gemma 2", 2),
        ("Gemma 3, which sees", 6),
        ("DeepSeek-V3", 2),
        ("LFM2, convolutions", 2),
        ("Jamba", 5),
    ],
)
def test_a_miniature_has_a_layer_of_each_kind(family, layers):
    small = miniature(model_of(FAMILIES[family][0]), CPU)
    text = small.config.get_text_config()
    assert text.num_hidden_layers == layers and text.vocab_size == 64
    assert all(parameter.isfinite().all() for parameter in small.parameters())


def test_of_an_8b_it_takes_one_layer():
    """218 M parameters of it and little more, whatever ZeRO does with the 8 B."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_from_shape("configs/models/llama-3.1-8b.json"))
    layers = _layers(model, 32)
    assert _prefix_with_all_kinds(layers) == 1
    small = miniature(model, torch.device("meta"))
    assert sum(parameter.numel() for parameter in small.parameters()) < 220e6


def test_random_numbers_go_on_as_if_nothing_had_been_measured():
    model = model_of(FAMILIES["LLaMA"][0])
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    packing_problem(model, COLLATOR, CPU)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_default_dtype() == torch.float32


def test_what_cannot_be_built_is_said():
    model = model_of(FAMILIES["LLaMA"][0])
    model.config.hidden_act = "no_such"
    problem = packing_problem(model, COLLATOR, CPU)
    assert "whether LlamaForCausalLM keeps packed examples apart could not be measured" in problem
    assert "Leave out --packing" in problem
