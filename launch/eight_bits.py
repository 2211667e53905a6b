"""Weights of eight bits (``weights: "int8"``) are put there on the host, before the model is moved to a GPU that may not have
room for more.
"""

from typing import Any

from transformers import PreTrainedModel

from ds_mofa.optimizers.registry import find
from ds_mofa.options import OptionError
from launch.arguments import TrainingArguments
from launch.deepspeed_json import nested_value
from launch.engines import Engine
from launch.errors import UserError

__all__ = ["keep_in_eight_bits", "wanted"]

_OF_THE_SPLIT = ("rank", "include", "exclude")  # the options by which a parameter is a matrix


def wanted(args: TrainingArguments) -> bool:
    """Whether the optimizer is to keep its matrices so."""
    return _named(args)[1].get("weights") == "int8"


def keep_in_eight_bits(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Do it where it is wanted.

    Raises:
        UserError: it cannot be.
    """
    name, options = _named(args)
    entry = find(name)
    if entry is None or options.get("weights") != "int8":
        return
    try:
        entry.optimizer.to_int8(model, **{key: options[key] for key in _OF_THE_SPLIT if key in options})
    except OptionError as error:
        raise UserError(str(error)) from None


def _named(args: TrainingArguments) -> tuple[str, dict[str, Any]]:
    """The optimizer and its options, by the command line or the JSON."""
    if args.engine is not Engine.DEEPSPEED:
        return args.optimizer or "", args.optimizer_options or {}
    section: Any = nested_value(args.hf_deepspeed_config.config, "optimizer") or {}
    return section.get("type", ""), section.get("params") or {}
