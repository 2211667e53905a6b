"""How a run is spelled: the words between the colons of ``zero2:MoFaSGD:r=32:liger=1``, to values and back."""

import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

__all__ = ["WORDS", "SettingError", "alternatives", "read_fields", "read_option", "spell"]

# The words that are not the names of what they set.
_SHORT = {"r": "rank", "adamw": "adamw_states"}

_KINDS: dict[str, type] = {
    "rank": int, "states": str, "weights": str, "reshard": bool, "gathered": bool, "replicas": int, "offload": str,
    "compiled": bool, "graphed": bool, "head": str, "embed": str, "checkpointing": bool, "liger": bool, "loss": str,
    "leaf": bool, "prefetch": int, "contiguous": bool, "overlap": bool, "bucket": int, "card": float, "gpus": int, "seq": int,
    "micro_batch": int, "micro_batches": int,
}  # fmt: skip
WORDS = ("r", "adamw", "head_loss", *(name for name in _KINDS if name != "rank"))


class SettingError(ValueError):
    """A run that cannot be; the message names what is wrong with it, and the way out."""


def read_option(word: str, text: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The field or option that ``word=text`` sets, with its value.

    Args:
        kinds: of the optimizers' options, by name.

    Raises:
        SettingError: a word that no run has, which would otherwise go unread, or a value of another kind.
    """
    if word == "head_loss":
        if text != "fused":
            raise SettingError(f"head_loss is {text!r}: give fused, or leave it out")
        return {"fused_head": True}
    name = _SHORT.get(word, word)
    kind = {**kinds, **_KINDS}.get(name)
    if kind is None:
        raise SettingError(f"no option {word}; there are {', '.join(_words(kinds))}")
    return {name: _read(kind, word, text)}


def _words(kinds: Collection[str]) -> list[str]:
    return sorted({*WORDS, *kinds} - {*_SHORT.values(), "fused_head"})


def spell(values: Mapping[str, Any]) -> list[str]:
    """``word=text`` of each, in their order; :func:`read_option` reads them."""
    short = {name: word for word, name in _SHORT.items()}
    return [
        "head_loss=fused" if name == "fused_head" else f"{short.get(name, name)}={_text(value)}"
        for name, value in values.items()
    ]


def read_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values as command lines have them as those of fields: a ``zero`` that is given, "none" for the backend torch, is
    one of the backends, and a ``shape`` is TOKENSxMICRO_BATCHES.

    Raises:
        SettingError: another shape, or a backend beside a stage of ZeRO.
    """
    values = dict(given)
    if "zero" in values:
        stage = values.pop("zero")
        named = "torch" if stage in (None, "none") else f"zero{stage}"
        if values.setdefault("backend", named) != named:
            raise SettingError(f"the backend is {values['backend']!r} and zero is {stage!r}: give one of them")
    if "shape" in values:
        shape = values.pop("shape")
        tokens, _, micro_batches = shape.partition("x")
        if not (tokens.isdecimal() and micro_batches.isdecimal()):
            raise SettingError(f"shape {shape!r} is not TOKENSxMICRO_BATCHES, such as 1024x8")
        values |= {"seq": int(tokens), "micro_batches": int(micro_batches)}
    return values


def alternatives(known: Sequence[Any]) -> str:
    """Words of a sentence: all of them, an "or" before the last."""
    *first, last = ["none" if one is None else str(one) for one in known]
    return f"{', '.join(first)} or {last}"


def _read(kind: Any, word: str, text: str) -> Any:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in kinds and text == "none":
        return None
    if bool in kinds:
        if text not in ("0", "1"):
            raise SettingError(f"{word} is {text!r}: give 0 or 1")
        return text == "1"
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError as error:
                raise SettingError(f"{word} is {text!r}: give a number") from error
    item = typing.get_args(kind)
    if typing.get_origin(kind) is not None and typing.get_origin(kind) is not typing.Literal:  # a sequence
        return tuple(_read(item[0], word, part) for part in text.split(",") if part)
    return text


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
