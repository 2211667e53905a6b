"""A model's shape, from a JSON such as those of configs/models, and whether a tokenizer fits it."""

import importlib
import inspect
import re
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from launch.errors import UserError
from launch.json_files import read_json


def config_from_shape(path: str) -> PretrainedConfig:
    """Read a model shape such as configs/models/llama-3.1-8b.json."""
    shape = read_json(path, "the --model_config")
    if "model_type" not in shape:
        raise UserError(f'{path}: no "model_type", so the architecture is unknown. Add it, such as "llama".')
    try:
        config = AutoConfig.for_model(**shape)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"{path}: not a model that transformers can build ({error}). Correct it.") from error
    unknown = _unknown(shape, config)
    if unknown:
        raise UserError(f"{path}: {shape['model_type']} has no setting {', '.join(unknown)}. Correct or remove it.")
    return config


def _unknown(shape: dict[str, Any], config: PretrainedConfig) -> list[str]:
    """The keys that mean nothing, of the configs within it too. A config takes any, and leaves its default in force."""
    known = type(config)()
    unknown = [key for key in shape if not hasattr(known, key) and not _is_read(key, config)]
    for key, value in shape.items():
        inner = getattr(config, key, None)
        if isinstance(value, dict) and isinstance(inner, PretrainedConfig):
            unknown += [f"{key}.{name}" for name in _unknown(value, inner)]
    return unknown


def _is_read(key: str, config: PretrainedConfig) -> bool:
    """Whether the model reads a setting that its config does not declare, such as the head_dim of Qwen3-MoE's."""
    try:
        module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return False
    return re.search(rf"\b{re.escape(key)}\b", inspect.getsource(module)) is not None


def check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = config.get_text_config().vocab_size  # of one that has parts, the part that reads tokens
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens and the model only {vocabulary}. Use the model's own "
            "tokenizer, or a larger vocab_size in --model_config."
        )
