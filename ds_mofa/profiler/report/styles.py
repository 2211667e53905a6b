"""Colours, dashes and markers that readers who do not see all colours tell apart too, on white and on black.

The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color), made for that. Lines differ in dash and marker
besides, so that a print without colour can be read; areas in the lightness of neighbours.
"""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["AREA_COLORS", "HIGHLIGHTED", "INK", "PAPER", "SOFT", "Style", "styles_of"]

INK, SOFT, PAPER = "#1c2128", "#5b6470", "#fefefe"  # of text and background; a page replaces them by its own
_BLUE, _VERMILLION, _GREEN, _PURPLE, _ORANGE, _SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
_GREYS = ("#8a8f98", "#a7abb3")


class Style(NamedTuple):
    """How a line is drawn: ``dash`` and ``marker`` are matplotlib's; ``strong`` lines stand before the grey ones."""

    color: str
    dash: str | tuple[int, tuple[float, ...]]
    marker: str
    strong: bool


_SOLID, _DASHED, _DOTTED, _MIXED = "-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.5, 2))
HIGHLIGHTED = (
    Style(_BLUE, _SOLID, "o", True),
    Style(_VERMILLION, _DASHED, "s", True),
    Style(_GREEN, _MIXED, "^", True),
    Style(_PURPLE, _SOLID, "D", True),
    Style(_ORANGE, _DOTTED, "v", True),
    Style(_SKY, _DASHED, "P", True),
)
_GREY = tuple(
    Style(color, dash, marker, False)
    for marker in ("x", "+", "1", "2", "3", "4")
    for color in _GREYS
    for dash in (_SOLID, _DASHED, _DOTTED, _MIXED)
)


def styles_of(labels: Sequence[str], highlighted: Sequence[str]) -> dict[str, Style]:
    """A style for each label, no two the same: at most six in colour, the rest grey.

    Args:
        labels: all lines, in their order.
        highlighted: those of them that a reader looks for, most important first; of more than six the first six.
    """
    strong = dict(zip([label for label in highlighted if label in labels], HIGHLIGHTED))
    rest = [label for label in labels if label not in strong]
    grey = {label: _GREY[i % len(_GREY)] for i, label in enumerate(rest)}
    return {label: strong.get(label) or grey[label] for label in labels}


# What memory is counted as. Neighbours of a stack differ in lightness; what no tensor of the training owns is grey.
AREA_COLORS = {
    "weights": _BLUE,
    "master weights": "#8fc3e3",
    "gradients": _VERMILLION,
    "AdamW states": _ORANGE,
    "other optimizer states": "#7a5c00",
    "factors": _GREEN,
    "sketches": "#8fd6bf",
    "activations": _PURPLE,
    "workspace": _SKY,
    "communication buffers": "#f0e442",
    "allocator slack": "#b9bec6",
    "CUDA context": "#858c96",
    "before this process": "#d5d9de",
    "process base": "#858c96",
    "unexplained": "#4d545e",
    "outside the allocator": "#858c96",
    "allocated": _BLUE,
    "resident set": _BLUE,
}
