"""A pre-trained decoder of a folder or of the Hub, as tasks start from it."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from experiments.comparison.digests import digest_of_files
from launch.errors import UserError
from launch.shapes import check_vocabulary

__all__ = ["files_of", "load_decoder"]

_WEIGHTS_AND_SHAPES = (".json", ".safetensors", ".bin")


def files_of(pretrained: str) -> dict[str, str] | str:
    """What tells one from another: the hashes of a folder's files, so that it may be moved, or a Hub name."""
    folder = Path(pretrained)
    if not folder.is_dir():
        return pretrained
    return digest_of_files(sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS_AND_SHAPES))


def load_decoder(pretrained: str, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The decoder in fp32, whose vocabulary holds the tokenizer's.

    Raises:
        UserError: there is none, or the tokenizer has tokens that it has not.
    """
    transformers_logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    try:
        model = AutoModelForCausalLM.from_pretrained(pretrained, **options)
    except OSError as error:
        raise UserError(f"task.pretrained: {pretrained} could not be loaded ({error}).") from None
    check_vocabulary(model.config, tokenizer)
    model.config.use_cache = False
    return model
