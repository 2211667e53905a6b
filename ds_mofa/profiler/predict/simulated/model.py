"""The model that transformers would build, and the operators that it computes with."""

import contextlib
import json
import re
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_mofa.optimizers.registry import OPTIMIZERS
from ds_mofa.parameters.experts import holds_experts
from ds_mofa.profiler.predict.simulated.errors import PredictionError
from ds_mofa.profiler.predict.simulated.liger import MODELS, WITH_EXPERTS, fused
from ds_mofa.profiler.setting import RunSetting

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    raise ImportError(
        f"a prediction builds the model with transformers ({error}): pip install 'ds_mofa[train]'"
    ) from error

__all__ = [
    "attention", "build", "embedding_patterns", "head_names", "one_sequence_a_row", "operators", "positions",
]  # fmt: skip


def build(setting: RunSetting) -> nn.Module:
    """In the weights' dtype, in training mode, with what the setting says of checkpointing and of the embedding.

    Raises:
        PredictionError: no model can be built from its config.
    """
    config = AutoConfig.for_model(**_shape_in(setting.model_config))
    config.get_text_config().use_cache = config.use_cache = False
    dtype = torch.float32 if setting.weights == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention(config)).train()
    if any(map(holds_experts, model.modules())):  # a loop over them looks into the routing
        model.set_experts_implementation("grouped_mm")
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.embed == "frozen":
        model.get_input_embeddings().weight.requires_grad_(False)
    return model


def attention(config: Any) -> str:
    """torch's scaled dot-product attention where the model has it, else its own code: GPT-OSS has sinks."""
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return "sdpa" if kind._supports_sdpa else "eager"


def _shape_in(path: str) -> dict[str, Any]:
    try:
        shape = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise PredictionError(
            f"{path}: no model shape could be read ({error}). Give a model's config.json, or a name that `ds-mofa config` lists"
        ) from error
    if "model_type" not in shape:
        raise PredictionError(f'{path}: no "model_type", so the architecture is unknown. Add it, such as "llama"')
    return shape


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Patterns that name the output head, for an optimizer's ``include``."""
    causal: Any = model  # with Hugging Face's methods
    head = causal.get_output_embeddings().weight
    return tuple(f"^{re.escape(name)}$" for name, param in model.named_parameters() if param is head)


def embedding_patterns(setting: RunSetting) -> tuple[str, ...]:
    """The ends of the names of embedding and output head, for ``include``, without what is a matrix already or not trained."""
    with FakeTensorMode():
        model: Any = build(setting)
    wanted = [] if setting.embed == "frozen" else [model.get_input_embeddings().weight]
    wanted += [] if setting.head == "matrix" else [model.get_output_embeddings().weight]
    names = [name for name, param in model.named_parameters() if any(param is one for one in wanted)]
    return tuple(name.removesuffix(".weight").rpartition(".")[2] for name in names)


def positions(path: str) -> int | None:
    """The longest sequence that a model is made for; None where its config names none."""
    config = AutoConfig.for_model(**_shape_in(path)).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def operators(model: nn.Module, setting: RunSetting, loss: bool) -> contextlib.AbstractContextManager:
    """Within: the model computes with liger-kernel's operators, if the setting says so; with ``loss`` that of the loss too."""
    if not setting.liger:
        return contextlib.nullcontext()
    config: Any = model.config
    known = (*MODELS, *WITH_EXPERTS) if setting.optimizer in OPTIMIZERS else MODELS
    if config.model_type not in known:
        raise PredictionError(
            f'liger-kernel with a model of type "{config.model_type}" and {setting.optimizer} cannot be predicted: which of '
            f"its operators are replaced is known of {', '.join(known)}. Predict it without liger"
        )
    return fused(model, loss)


@contextlib.contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Within: transformers takes each row for one sequence, as it finds real rows to be.

    It looks into the position ids for packed sequences. Fake ones have no values to look into, and it would then build
    a mask, expand keys and values to all heads, and save those.
    """
    try:
        with unittest.mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None):
            yield
    except (ModuleNotFoundError, AttributeError) as error:
        if "find_packed_sequence_indices" not in str(error) and "masking_utils" not in str(error):
            raise
        raise PredictionError(f"this version of transformers looks for packed sequences elsewhere ({error})") from error
