"""The shipped shapes are the published models, and a wrong shape is refused with a reason."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from launch.arguments import ModelArguments
from launch.engines import Engine
from launch.errors import UserError
from launch.models import (
    build_model,
    check_vocabulary,
    config_from_shape,
    count_parameters,
    describe_attention,
    load_model,
)
from launch.tokenizer import byte_tokenizer

# As the model cards give them, in parameters; Llama 3.2's embedding is tied to its head and counts once.
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
}
NO_OPTIMIZER = {"optimizer": None, "optimizer_options": None}  # Hugging Face's
# As cards and papers give them, in billions: Gemma and Qwen3.5 without vision, DeepSeek-V3 without its second prediction.
BILLIONS = {
    "qwen3.5-9b": "9",
    "gemma-3-4b": "3.88",
    "gemma-3-27b": "27.0",
    "gpt-oss-20b": "20.91",
    "gpt-oss-120b": "116.83",
    "qwen3-14b": "14.8",
    "qwen3-32b": "32.8",
    "qwen3-30b-a3b": "30.5",
    "mixtral-8x7b": "46.7",
    "deepseek-v3": "671",
}


def size_of(name: str) -> int:
    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(config_from_shape(f"configs/models/{name}.json")))


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_shapes_have_the_published_size(name, parameters):
    assert size_of(name) == parameters


@pytest.mark.parametrize(("name", "billions"), BILLIONS.items())
def test_shapes_have_the_published_size_as_far_as_it_is_given(name, billions):
    digits = len(billions.partition(".")[2])
    assert f"{size_of(name) / 1e9:.{digits}f}" == billions


def test_the_tiny_shape_fits_the_byte_tokenizer_and_runs():
    config = config_from_shape("configs/models/llama-tiny.json")
    check_vocabulary(config, byte_tokenizer())
    model = build_model(config, torch.device("cpu"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, config.vocab_size)


def test_a_tokenizer_larger_than_the_model_raises():
    with pytest.raises(UserError, match="The tokenizer has 262 tokens and the model only 100"):
        check_vocabulary(LlamaConfig(vocab_size=100), byte_tokenizer())


PARTS = {
    "model_type": "gemma3",
    "text_config": {"vocab_size": 270, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                      "image_size": 28, "patch_size": 14},
}  # fmt: skip


def test_of_a_config_with_parts_the_one_that_reads_tokens_counts(tmp_path):
    file = tmp_path / "shape.json"
    file.write_text(json.dumps(PARTS))
    config = config_from_shape(str(file))
    assert not hasattr(config, "vocab_size")
    check_vocabulary(config, byte_tokenizer())
    arguments = SimpleNamespace(engine=Engine.ONE, device=torch.device("cpu"), dtype="float32", **NO_OPTIMIZER)
    model = load_model(ModelArguments(model_config=str(file)), arguments, byte_tokenizer())
    assert model.config.get_text_config().use_cache is False
    file.write_text(json.dumps(PARTS | {"text_config": PARTS["text_config"] | {"vocab_size": 100}}))
    with pytest.raises(UserError, match="262 tokens and the model only 100"):
        check_vocabulary(config_from_shape(str(file)), byte_tokenizer())


BAD_SHAPES = {
    "no type": ({"hidden_size": 8}, 'no "model_type"'),
    "unknown type": ({"model_type": "lama"}, "not a model that transformers can build"),
    "misspelt key": ({"model_type": "llama", "hiden_size": 8}, "llama has no setting hiden_size"),
    "misspelt key of a part": (
        {"model_type": "gemma3", "text_config": {"hiden_size": 8}},
        "gemma3 has no setting text_config.hiden_size",
    ),
    "heads do not divide": (
        {"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3},
        "not a model that transformers can build",
    ),
}


@pytest.mark.parametrize(("shape", "message"), BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_a_bad_shape_is_named(tmp_path, shape, message):
    file = tmp_path / "shape.json"
    file.write_text(json.dumps(shape))
    with pytest.raises(UserError, match=message) as raised:
        config_from_shape(str(file))
    assert str(raised.value).startswith(str(file))


def test_a_setting_that_the_model_reads_and_its_config_does_not_declare_is_known(tmp_path):
    file = tmp_path / "shape.json"
    file.write_text(json.dumps({"model_type": "qwen3_moe", "hidden_size": 16, "num_attention_heads": 2, "head_dim": 4}))
    assert config_from_shape(str(file)).head_dim == 4


SMALL = {"vocab_size": 262, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ATTENTION = {
    "llama": (SMALL | {"intermediate_size": 16}, "sdpa"),
    "bloom": (
        {"vocab_size": 262, "hidden_size": 16, "n_layer": 1, "n_head": 2},
        "eager, for BloomForCausalLM has no sdpa",
    ),
    "mpt": ({"vocab_size": 262, "d_model": 16, "n_layers": 1, "n_heads": 2}, "eager, for MptForCausalLM has no sdpa"),
    "mamba": (
        {"vocab_size": 262, "hidden_size": 16, "num_hidden_layers": 1},
        "eager, for MambaForCausalLM has no sdpa",
    ),
    "gpt_oss": (
        SMALL | {"intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2},
        "eager, for GptOssForCausalLM has no sdpa",
    ),
}


def load_shape(tmp_path, kind: str, **options):
    file = tmp_path / "shape.json"
    file.write_text(json.dumps({"model_type": kind, **ATTENTION[kind][0]}))
    args = ModelArguments(model_config=str(file), **options)
    training = SimpleNamespace(
        bf16=False, fp16=False, dtype=None, engine=Engine.ONE, device=torch.device("cpu"), **NO_OPTIMIZER
    )
    return args, load_model(args, training, byte_tokenizer())


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_model_without_the_default_attention_has_another_and_says_so(tmp_path, kind):
    assert describe_attention(*load_shape(tmp_path, kind)) == ATTENTION[kind][1]


def test_an_attention_that_is_asked_for_is_had_or_refused(tmp_path):
    args, model = load_shape(tmp_path, "llama", attn_implementation="eager")
    assert describe_attention(args, model) == "eager"
    with pytest.raises(UserError, match="--attn_implementation sdpa: BloomForCausalLM does not support"):
        load_shape(tmp_path, "bloom", attn_implementation="sdpa")
    with pytest.raises(UserError, match="--attn_implementation no_such: "):
        load_shape(tmp_path, "llama", attn_implementation="no_such")
