"""The page of the study of AdamW's updates; it has no figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_mofa.profiler.report.document import Table
from ds_mofa.profiler.report.rendering import markdown_table

__all__ = ["TITLE", "draw", "sections"]

TITLE = "How large AdamW's update is"

_SET_UP = """
W <- W - lr N. The gradients are of the trainer's path; N is Adam's direction of them (betas 0.9 and 0.999). The root mean
square of N's entries, and its singular values in units of sqrt(max(m, n)), which is what all of them would be if N were
orthogonal and its root mean square 1. Means over the matrices and the looks.
"""


def sections(result: Mapping[str, Any], figures: Sequence[str]) -> list[str]:
    found = [_SET_UP]
    for name, measured in result["tasks"].items():
        header = [name, "RMS", *(f"singular value {top}" for top in measured["tops"])]
        ways = {"all matrices": measured["all"], **measured["shapes"]}
        rows = [[way, _shown(sizes["rms"]), *map(_shown, sizes["singular"])] for way, sizes in ways.items()]
        steps = ", ".join(str(step) for step, *_ in measured["series"])
        found += [f"## {name}", markdown_table(Table(header, rows)), f"Looks after the steps {steps}."]
    return found


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    return []


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
