"""When the GPU's memory runs out: what had it, and what of that has grown.

PyTorch's allocator calls its observers when it gives up, while everything is still there; an exception's handler comes after
the frames that held the activations are gone. An observer cannot be taken back, so there is one for all profilers.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from ds_mofa.profiler.categories import CATEGORIES
from ds_mofa.profiler.report.document import Document, Section, Table, Text
from ds_mofa.profiler.report.units import shown, unit_of

__all__ = ["TEMPORARY", "explain", "forget", "gathered_up", "watch"]

TEMPORARY = "activations and workspace"  # without a history the two are not told apart
_PARTS = ("activations", "workspace", "unexplained")

_watching: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_attached = False


def watch(profiler: Any) -> None:
    """Call ``profiler.out_of_memory(device, asked, free)`` when an allocation fails; sizes in bytes."""
    global _attached
    if not _attached:
        torch._C._cuda_attach_out_of_memory_observer(_observe)  # type: ignore[attr-defined]  # of builds with CUDA
        _attached = True
    _watching[id(profiler)] = profiler


def forget(profiler: Any) -> None:
    """The end of :func:`watch`."""
    _watching.pop(id(profiler), None)


def _observe(device: int, asked: int, _: int, free: int) -> None:
    for profiler in list(_watching.values()):
        try:
            profiler.out_of_memory(device, asked, free)
        except Exception as error:  # the program is to end with the allocator's error, and not with this one
            profiler.notes.append(f"The memory ran out, and there is no page on it: {type(error).__name__}: {error}")


def gathered_up(parts: Mapping[str, int], allocated: int | None = None) -> dict[str, int]:
    """Bytes by category, what lives for a part of a step as one; what of ``allocated`` is in no category belongs to it."""
    found = {name: size for name, size in parts.items() if name not in _PARTS}
    rest = sum(parts.get(name, 0) for name in _PARTS) if allocated is None else allocated - sum(found.values())
    return {**found, TEMPORARY: max(0, rest)}


def explain(
    *,
    step: int,
    phase: str | None,
    asked: int,
    free: int,
    now: Mapping[str, int],
    before: Mapping[str, int],
    of: str,
    shapes: tuple[tuple[int, int] | None, tuple[int, int] | None] = (None, None),
) -> tuple[str, Document]:
    """Which category has grown most, and a page on it.

    Args:
        step: of the optimizer, from 0.
        phase: in which it happened.
        asked: bytes of the allocation that failed.
        free: on the device then.
        now: bytes by category, of :func:`gathered_up`.
        before: the same of another moment, ``of`` which it is.
        shapes: (sequences, tokens) of the largest forward before that moment, and in all.
    """
    names = [name for name in (*CATEGORIES, TEMPORARY) if now.get(name) or before.get(name)]
    grown = {name: now.get(name, 0) - before.get(name, 0) for name in names}
    most = max(grown, key=grown.__getitem__, default=TEMPORARY)
    unit = unit_of([*now.values(), *before.values(), asked])
    rows = [
        [
            name,
            *(unit.number(part.get(name, 0), digits=3) for part in (now, before)),
            unit.number(grown[name], digits=3),
        ]
        for name in sorted(names, key=lambda name: -grown[name])
    ]
    total = [sum(part.values()) for part in (now, before)]
    rows.append(["sum", *(unit.number(size, digits=3) for size in (*total, total[0] - total[1]))])
    text = (
        f"In step {step}, {phase or 'between phases'}: {shown(asked)} were asked for, {shown(free)} were free on the device. "
        f"Since {of}, {most} have grown most, by {shown(grown.get(most, 0))}."
    )
    first, second = shapes
    if first and second and first != second:
        text += (
            f" The largest forward was of {first[0]} x {first[1]} tokens then, and is of {second[0]} x {second[1]} now."
        )
    table = Table([f"category, {unit.name}", "now", f"at {of}", "grown by"], rows, summed=True)
    return most, Document(
        "Out of memory", text, [Section("What had it", [table, Text(_ADVICE.get(most, _ADVICE[""]))])]
    )


_ADVICE = {
    TEMPORARY: "Shorter sequences, smaller micro-batches, checkpointing of the activations and fused_head lower these; "
    "ds-mofa predict --fit SIZE says by how much.",
    "gradients": "Of the matrices MoFaSGD keeps none; embedding and head have none either once include names them.",
    "AdamW states": 'They come with the first step. adamw_states: "8bit", offload, and embedding and head as matrices '
    "lower them.",
    "": "ds-mofa predict --fit SIZE says what fits a card, and what each switch gains.",
}
