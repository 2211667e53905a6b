"""What Hugging Face's Trainer and Accelerate get in several scenes: a model, sentences, a DeepSpeed JSON."""

import json
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from deepspeed import comm as dist
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, VOCABULARY = 8, 64


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=52, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))


def sentences(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(VOCABULARY, (count, 1), generator=generator)
    tokens = (first + 3 * torch.arange(LENGTH)) % VOCABULARY  # each token is the last one and 3
    return [{"input_ids": row, "labels": row} for row in tokens]


def config_file(stage: int, leaf: bool = False) -> str:
    """As a user writes it: what the Trainer knows is "auto". ``leaf``: a decoder layer is gathered at a time."""
    optimizer = {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto", "rank": 4, "torch_adam": True}
    optimizer["adjust_lr_fn"] = "adamw"  # whatever the rate is
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "MoFaSGD", "params": optimizer},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 40},
    }
    if leaf:
        settings["zero_optimization"]["leaf_module"] = {"classes": ["LlamaDecoderLayer"]}
    path = Path(f"rank{dist.get_rank()}.json")  # the ranks share the folder
    path.write_text(json.dumps(settings))
    return str(path)


def forget_accelerate() -> None:
    """Its state is one per process, and another scene comes with another stage."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
