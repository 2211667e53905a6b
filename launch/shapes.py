"""A model's shape, from a JSON such as those of configs/models, and whether a tokenizer fits it."""

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
    # A config takes any key, so a misspelt one would leave its default in force.
    known = type(config)()
    unknown = [key for key in shape if not hasattr(known, key)]
    if unknown:
        raise UserError(f"{path}: {shape['model_type']} has no setting {', '.join(unknown)}. Correct or remove it.")
    return config


def check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens and the model only {config.vocab_size}. Use the model's own "
            "tokenizer, or a larger vocab_size in --model_config."
        )
