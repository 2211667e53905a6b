"""What figures show, as numbers; :mod:`ds_mofa.profiler.report.drawing` draws them."""

import dataclasses
from collections.abc import Mapping, Sequence

from ds_mofa.profiler.report.styles import Style

__all__ = ["Areas", "Bar", "Bars", "Chart", "Lines", "Phase", "Series"]


@dataclasses.dataclass(frozen=True)
class Series:
    """A line, and a band from ``low`` to ``high`` around it (of no width: none is drawn)."""

    label: str
    style: Style
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Lines:
    """Lines over one x axis; ``name`` is for files.

    Attributes:
        ticks: names of x = 0, 1, 2, ..., where it stands for no quantity.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    ticks: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Bar:
    """One stacked bar; bytes by category, from the left.

    Attributes:
        predicted: whether it is a prediction, which is drawn thinner, under what was measured.
    """

    label: str
    parts: Mapping[str, int]
    predicted: bool = False

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Bars:
    """Stacked bars on one scale."""

    name: str
    title: str
    bars: Sequence[Bar]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A named stretch of the x axis."""

    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Areas:
    """Bytes by category over time, stacked.

    Attributes:
        peak: where on the x axis the largest sum stands, if that is to be marked.
    """

    name: str
    title: str
    x_label: str
    x: Sequence[float]
    layers: Mapping[str, Sequence[int]]
    peak: float | None = None
    phases: Sequence[Phase] = ()


Chart = Lines | Bars | Areas
