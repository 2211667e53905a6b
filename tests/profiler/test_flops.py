"""Model FLOPs of a token: against what torch counts of a real forward, and by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MixtralConfig, Qwen3NextConfig

from ds_mofa.profiler.measure.flops import flops_per_token, peak_flops

SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
LLAMA = LlamaConfig(**SIZES, intermediate_size=24)


@pytest.mark.parametrize("tied", [False, True])
def test_three_forwards_as_torch_counts_them(tied):
    config = LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 32, dtype=torch.long))
    # It counts the rotary embedding's angles too.
    assert flops_per_token(model, 32) * 32 == pytest.approx(3 * counter.get_total_flops(), rel=2e-3)


def test_a_token_meets_the_experts_that_are_chosen():
    dense = AutoModelForCausalLM.from_config(LLAMA)
    config = MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2)
    experts = AutoModelForCausalLM.from_config(config)
    one = 3 * 3 * 16 * 24  # three layers' gate, up and down of one expert
    assert flops_per_token(experts, 32) - flops_per_token(dense, 32) == 6 * one * (2 - 1)


def test_weights_in_partitions_count_whole():
    """Stage 3 leaves empty tensors, and their shapes beside them."""
    model = AutoModelForCausalLM.from_config(LLAMA)
    wanted = flops_per_token(model, 32)
    for param in model.parameters():
        param.ds_shape = param.shape
        param.data = torch.empty(0)
    assert flops_per_token(model, 32) == wanted


def test_layers_of_linear_attention_attend_to_nothing():
    config = Qwen3NextConfig(
        **SIZES, head_dim=4, layer_types=["linear_attention", "full_attention", "linear_attention"]
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert flops_per_token(model, 132) - flops_per_token(model, 32) == 12 * 1 * 4 * 4 * 100
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2))
    assert flops_per_token(mamba, 132) == flops_per_token(mamba, 32) > 0


def test_a_card_that_is_not_known_has_no_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("CPU") is None
