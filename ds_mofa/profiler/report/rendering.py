"""A document as Markdown, as one HTML page that needs no network, and as files."""

import importlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ds_mofa.profiler.report.document import Document, Table

__all__ = ["NO_MATPLOTLIB", "drawing_or_none", "html", "markdown", "markdown_table", "write"]

NO_MATPLOTLIB = "No figures: matplotlib is missing. Install it with: pip install 'ds_mofa[profile]'"
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=lambda name: name is None or name.endswith(".html.jinja"),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
)


def drawing_or_none():
    """:mod:`ds_mofa.profiler.report.drawing`, or None where matplotlib, an extra, is not installed."""
    try:
        return importlib.import_module("ds_mofa.profiler.report.drawing")
    except ImportError:
        return None


def markdown_table(table: Table) -> str:
    """The table without its empty columns."""
    table = table.trimmed()
    rows = [list(row) for row in table.rows]
    if table.summed:
        rows[-1] = [f"**{cell}**" for cell in rows[-1]]
    lines = ["| " + " | ".join(table.header) + " |", "| --- |" + " ---: |" * (len(table.header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


_TEMPLATES.filters["markdown_table"] = markdown_table


def markdown(document: Document, pictures: bool = True) -> str:
    """For a terminal, a pull request or a repository; ``pictures`` are PNGs beside it."""
    text = _TEMPLATES.get_template("page.md.jinja").render(document=document, pictures=pictures)
    return text.rstrip("\n") + "\n"


def html(document: Document) -> str:
    """Light and dark, on a phone and on paper; figures are part of it."""
    drawing = drawing_or_none()
    figures = {chart.name: drawing.svg(chart) for chart in document.charts} if drawing else {}
    style = _TEMPLATES.get_template("style.css").render()
    return _TEMPLATES.get_template("page.html.jinja").render(document=document, figures=figures, style=style)


def write(document: Document, folder: Path, markdown_name: str) -> list[Path]:
    """The Markdown, report.html and, with matplotlib, a PNG for each chart; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawing = drawing_or_none()
    texts = {markdown_name: markdown(document, pictures=drawing is not None), "report.html": html(document)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    pictures = []
    if drawing is not None:
        pictures = [drawing.save_png(drawing.draw(chart), folder / f"{chart.name}.png") for chart in document.charts]
    return [folder / name for name in texts] + pictures
