"""A picture of one training step on a GPU: what its kernels do, one lane for each kind of work, on one axis of time."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ds_mofa.profiler.report.styles import HIGHLIGHTED

__all__ = ["KINDS", "draw_timeline", "kind_of", "lanes"]

# The first that a kernel's name holds is its kind; from the top of the picture to its bottom.
KINDS: dict[str, str] = {
    "collectives": r"^nccl",
    "copies": r"^Mem(cpy|set)",
    "write of W": r"_write_(pairs_)?kernel",
    "AdamW": r"FusedOptimizer|FusedAdam",
    "sketches": r"_project_kernel|_accumulate_kernel|_grouped",
    "factor update": r"jacobi|d884|f64|potrf|trsm|double",
    "attention": r"sdpa|flash|fmha|attention",
    "products": r"gemm|nvjet|cutlass|_rows_kernel|_columns_kernel",
}
_OTHERS = "all else"
_ZOOM = 0.12  # of the step: its end, where the sketches are sent and the weights written


def kind_of(kernel: str) -> str:
    """Of :data:`KINDS`, or "all else"."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), _OTHERS)


def lanes(kernels: Iterable[Any]) -> dict[str, list[tuple[float, float]]]:
    """Begin and duration in milliseconds from the first kernel on, of each kind that there is.

    Args:
        kernels: events of ``torch.profiler`` on one CUDA device: ``name`` and ``time_range`` in microseconds.

    Raises:
        ValueError: there are none.
    """
    events = list(kernels)
    if not events:
        raise ValueError("the timeline is empty: profile a step that runs on a GPU")
    start = min(event.time_range.start for event in events)
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in (*KINDS, _OTHERS)}
    for event in events:
        span = event.time_range
        found[kind_of(event.name)].append(((span.start - start) / 1e3, (span.end - span.start) / 1e3))
    return {kind: sorted(spans) for kind, spans in found.items() if spans}


def draw_timeline(kernels: Iterable[Any], path: Path, title: str) -> Path:
    """The whole step, and its end once more, larger; a PNG.

    Raises:
        ValueError: there are no kernels.
    """
    from matplotlib.figure import Figure  # of the extra "profile"

    found = lanes(kernels)
    end = max(begin + length for spans in found.values() for begin, length in spans)
    figure = Figure(figsize=(9.2, 1.6 + 0.5 * len(found)), layout="constrained")
    whole, close = figure.subplots(2, 1)
    figure.suptitle(title, fontsize=10)
    _draw(whole, found, 0.0, end)
    _draw(close, found, end * (1 - _ZOOM), end)
    close.set_xlabel("milliseconds from the first kernel of the step; below, its end")
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def _draw(axes: Any, found: dict[str, Sequence[tuple[float, float]]], first: float, last: float) -> None:
    for row, spans in enumerate(found.values()):
        color = HIGHLIGHTED[row % len(HIGHLIGHTED)].color
        axes.broken_barh([span for span in spans if sum(span) >= first], (row - 0.4, 0.8), color=color)
    axes.set_xlim(first, last)
    busy = {kind: sum(length for _, length in spans) for kind, spans in found.items()}
    axes.set_yticks(range(len(found)), [f"{kind}, {busy[kind]:.1f} ms" for kind in found])
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
