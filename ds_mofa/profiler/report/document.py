"""A report as a tree of sections, which the Markdown and the page both show."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ds_mofa.profiler.report.charts import Chart

__all__ = ["Claims", "Code", "Document", "Figure", "Points", "Section", "Table", "Text"]

_EMPTY = ("", "-")


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str
    kind: str = "text"


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines as they are."""

    text: str
    kind: str = "code"


@dataclasses.dataclass(frozen=True)
class Points:
    """A list of sentences."""

    items: Sequence[str]
    kind: str = "points"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of text; the first column is of names, the others of numbers.

    Attributes:
        summed: whether the last row is the sum of those before it.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    summed: bool = False
    kind: str = "table"

    def trimmed(self) -> "Table":
        """Without the columns in which no row has anything."""
        kept = [
            i for i in range(len(self.header)) if i == 0 or any(row[i].strip("* ") not in _EMPTY for row in self.rows)
        ]
        rows = [[row[i] for i in kept] for row in self.rows]
        return dataclasses.replace(self, header=[self.header[i] for i in kept], rows=rows)


@dataclasses.dataclass(frozen=True)
class Claims:
    """Verdicts: for each ``claim``, ``measured``, ``verdict``, and ``holds``, which is None where nobody can say."""

    claims: Sequence[Mapping[str, Any]]
    kind: str = "claims"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart, by the name of its file."""

    chart: Chart
    kind: str = "figure"


Block = Text | Code | Points | Table | Claims | Figure


@dataclasses.dataclass(frozen=True)
class Section:
    """Blocks under a heading; the first of a document may have none.

    Attributes:
        folded: on a page, the reader has to open it.
    """

    title: str
    blocks: Sequence[Block]
    level: int = 2
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    subtitle: str
    sections: Sequence[Section]

    @property
    def charts(self) -> list[Chart]:
        """All of them, in their order."""
        return [block.chart for section in self.sections for block in section.blocks if isinstance(block, Figure)]
