"""The model: pretrained weights, or random ones of a given shape."""

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from launch import eight_bits
from launch.arguments import ModelArguments, TrainingArguments
from launch.engines import Engine
from launch.errors import UserError
from launch.shapes import check_vocabulary, config_from_shape

DEFAULT_ATTENTION = "sdpa"


def load_model(
    args: ModelArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load or build the model, in the precision that its weights will be trained in.

    ``training_args`` must exist before the model does: they keep HF's DeepSpeed config alive, by which the library
    knows that it has to build the model under ``deepspeed.zero.Init`` in stage 3.
    """
    if args.attn_implementation is not None:
        try:
            model = _load(args, training_args, args.attn_implementation)
        except (ImportError, ValueError) as error:
            if "attention" not in str(error).lower():
                raise
            raise UserError(
                f"--attn_implementation {args.attn_implementation}: {str(error).strip().splitlines()[0]} Leave it out "
                f"for {DEFAULT_ATTENTION}, or eager where a model has none."
            ) from error
    else:
        try:
            model = _load(args, training_args, DEFAULT_ATTENTION)
        except ValueError:  # the model has none; if it is anything else, it comes again
            model = _load(args, training_args, "eager")
    check_vocabulary(model.config, tokenizer)
    # The cache of keys and values is for generation; training would only carry it along.
    for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
        config.use_cache = False
    return model


def _load(args: ModelArguments, training_args: TrainingArguments, attention: str) -> PreTrainedModel:
    options = {"dtype": training_dtype(training_args), "attn_implementation": attention}
    if args.model_config:
        # FSDP2 moves what it has cut, and eight bits half of it; whole, a model may not fit a GPU.
        on_host = training_args.engine is Engine.FSDP2 or eight_bits.wanted(training_args)
        device = torch.device("cpu") if on_host else training_args.device
        return build_model(config_from_shape(args.model_config), device, **options)
    try:
        return AutoModelForCausalLM.from_pretrained(args.model_name_or_path, **options)
    except OSError as error:
        raise UserError(
            f"{args.model_name_or_path}: no model could be loaded ({str(error).strip().splitlines()[0]}). Give a "
            "folder with config.json and safetensors files, or a Hub name; without a network only folders work."
        ) from error


def describe_attention(args: ModelArguments, model: PreTrainedModel) -> str:
    """Which attention kernel the model has, and why where it is not the usual one."""
    found = model.config._attn_implementation
    if args.attn_implementation is None and found != DEFAULT_ATTENTION:
        return f"{found}, for {type(model).__name__} has no {DEFAULT_ATTENTION}"
    return found


def training_dtype(args: TrainingArguments) -> torch.dtype:
    """Of the weights."""
    if args.dtype is not None:
        return getattr(torch, args.dtype)
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def build_model(config: PretrainedConfig, device: torch.device, **options) -> PreTrainedModel:
    """Make a model with random weights on a device; ZeRO-3 places it shard by shard."""
    if is_deepspeed_zero3_enabled():
        return AutoModelForCausalLM.from_config(config, **options)
    with device:
        return AutoModelForCausalLM.from_config(config, **options)


def count_parameters(model: PreTrainedModel) -> int:
    """All parameters, tied ones once; under ZeRO-3 a parameter's own shape is empty and ``ds_numel`` is its size."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
