"""A module around a LLaMA of one layer, as a user's own loop may have one."""

import torch
from torch import nn
from toys import VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM


class OneLayer(nn.Module):
    """``model``, a LLaMA with the toys' vocabulary; the loss is for the subclass to say."""

    MATRICES = [
        *(f"model.model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"model.model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    ]

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=52, num_hidden_layers=1)
        heads = dict(num_attention_heads=4, num_key_value_heads=2)
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).train()
