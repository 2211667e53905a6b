"""How a model would be split, and what of it stands in memory: from its config alone, on the meta device, without a GPU.

:func:`described` answers ``python -m ds_mofa split``. It counts what is there between two steps. Activations, what a
backward gathers and an update's temporaries come on top: ``ds-mofa predict`` plays a step through for these.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_mofa.adamw.eight_bit import moment_bytes
from ds_mofa.optimizers.registry import entry_of
from ds_mofa.options import OptionError
from ds_mofa.parameters import Split, split_parameters
from ds_mofa.parameters.summary import FEW, count, largest, remedy, size
from ds_mofa.partition.layout import Layout
from ds_mofa.rules.rule import Rule

__all__ = ["ENGINES", "build", "described", "held", "shown"]

ENGINES = ("one process", "ddp", "zero1", "zero2", "zero3", "fsdp2")
_KINDS = ("weights", "gradients", "AdamW states", "matrices' masters", "sketches", "factors")
_SHOWN = 8


def build(source: str, dtype: torch.dtype) -> nn.Module:
    """The model of a config, without numbers in it.

    Args:
        source: a JSON such as those of configs/models, a folder with a config.json, or a Hub name that is at hand.
        dtype: of the weights.

    Raises:
        OptionError: no model can be built of it, or transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise OptionError(f"the model is built with transformers ({error}): pip install 'ds_mofa[train]'") from error
    try:
        config = _config(source, transformers.AutoConfig)
        makers = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
        with torch.device("meta"):
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                return makers[0](config) if makers and makers[0] is not None else _by_kind(config, transformers)
            finally:
                torch.set_default_dtype(before)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OptionError(
            f"{source}: no model can be built ({first}). Give a folder or config.json of transformers', or a name that "
            "`ds-mofa config` lists"
        ) from error


def _config(source: str, auto: Any) -> Any:
    path = Path(source)
    if not path.is_file():
        return auto.from_pretrained(source)
    shape = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(shape, dict) or "model_type" not in shape:
        raise ValueError('there is no "model_type" in it, such as "llama"')
    return auto.for_model(**shape)


def _by_kind(config: Any, transformers: Any) -> nn.Module:
    """Of a config that names no class: the first kind of model that there is of it."""
    for name in ("CausalLM", "ImageTextToText", "Seq2SeqLM", "MaskedLM"):
        auto = getattr(transformers, f"AutoModelFor{name}")
        if type(config) in auto._model_mapping:
            return auto.from_config(config)
    return transformers.AutoModel.from_config(config)


def described(
    model: nn.Module, params: Mapping[str, Any], *, optimizer: str = "MoFaSGD", gpus: int = 1
) -> dict[str, Any]:
    """The split of a model as JSON has it; sizes are bytes on each of ``gpus`` GPUs.

    Args:
        model: on any device.
        params: options of the optimizer.
        optimizer: a name of the registry.

    Raises:
        OptionError: an option that cannot be, or no matrix in the model.
    """
    entry = entry_of(optimizer)
    options = entry.options.from_config(params)[0]
    split = split_parameters(model, model.parameters(), options)
    rest = sum(one.numel for one in split.leftovers)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engines = ENGINES[:1] if gpus == 1 else ENGINES[1:]
    return {
        "model": type(model).__name__,
        "optimizer": entry.name,
        "rank": options.rank,
        "gpus": gpus,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": trained,
        "on_matrices": trained - rest,
        "on_adamw": rest,
        "share": split.share,
        "matrices": sum(matrix.stack or 1 for matrix in split.matrices),
        "largest_on_adamw": [
            {"name": name, "tensors": many, "parameters": numel, "reason": reason, "remedy": remedy(name, reason)}
            for name, many, numel, reason in largest(split.leftovers)
        ],
        "bytes": {engine: held(model, split, entry.rule(options), engine, gpus) for engine in engines},
        "summary": split.summary(),
    }


def held(model: nn.Module, split: Split, rule: Rule, engine: str, gpus: int) -> dict[str, int]:
    """Bytes on each GPU, by kind, and in all.

    AdamW keeps its moments in the weights' dtype in a plain loop, and under ZeRO moments and masters in fp32, as
    DeepSpeed does unless told otherwise. Gradients are AdamW's, in the weights' dtype: whole where ZeRO 1 and 2 collect
    them until the step. Shards are taken for equal parts.

    Args:
        rule: of the split's options.
        engine: one of :data:`ENGINES`.
    """
    zero, sharded = engine.startswith("zero"), engine in ("zero3", "fsdp2")
    options, rests = split.options, split.leftovers
    owners = 1 if engine == "ddp" else gpus
    places = [matrix.place for matrix in split.matrices]
    sketches = Layout(places, rule.columns, owners)
    state = Layout(places, rule.r, owners, rule.field_shapes)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(rest.numel * rest.itemsize for rest in rests)
    numel = sum(rest.numel for rest in rests)
    if options.adamw_states == "8bit":
        moments = sum(2 * moment_bytes(rest.numel) for rest in rests)
    else:
        moments = 8 * numel if zero else 2 * gradients
    states = moments + (4 * numel if zero else 0)
    wide = any(matrix.param.element_size() == 4 for matrix in split.matrices)
    masters = 0
    if options.master_weights:
        masters = 4 * sum(matrix.numel for matrix in split.matrices if matrix.param.element_size() < 4)
    parts = gpus if sharded else 1
    found = {
        "weights": weights // parts,
        "gradients": gradients // parts,
        "AdamW states": states // (gpus if zero or sharded else 1),
        "matrices' masters": masters // parts,
        "sketches": 4 * sketches.numel,
        "factors": (4 if wide else 2) * sketches.numel + 4 * state.segment,
    }
    return {**found, "all": sum(found.values())}


def shown(found: Mapping[str, Any]) -> str:
    """:func:`described` for a reader."""
    share = f"{100 * found['share']:.2f} %"
    lines = [
        f"{found['model']}: {count(found['parameters'])} parameters, {count(found['trained'])} trained; {share} of these are "
        f"{found['matrices']} matrices of rank {found['rank']} on {found['optimizer']}",
        f"left to AdamW: {count(found['on_adamw'])} parameters" + ("" if found["share"] >= FEW else ", which is much"),
    ]
    rests = found["largest_on_adamw"]
    for rest in rests[:_SHOWN]:
        tensors = f" in {rest['tensors']} tensors" if rest["tensors"] > 1 else ""
        lines.append(f"  {count(rest['parameters']):>8}{tensors}: {rest['name']} ({rest['reason']}; {rest['remedy']})")
    if len(rests) > _SHOWN:
        lines.append(
            f"  {count(sum(rest['parameters'] for rest in rests[_SHOWN:])):>8} in {len(rests) - _SHOWN} more kinds"
        )
    gpus = found["gpus"]
    lines.append("between steps, on one GPU" if gpus == 1 else f"between steps, on each of {gpus} GPUs")
    lines.append(" " * 20 + "".join(f"{engine:>14}" for engine in found["bytes"]))
    for kind in (*_KINDS, "all"):
        sizes = [one[kind] for one in found["bytes"].values()]
        if any(sizes):
            lines.append(f"  {kind:18}" + "".join(f"{size(one):>14}" for one in sizes))
    lines.append("activations, gathered weights and temporaries come on top: ds-mofa predict")
    return "\n".join(lines)
