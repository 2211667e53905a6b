"""A comparison as one HTML page that needs no network: light and dark, on a phone and on paper."""

from collections.abc import Sequence
from html import escape

from experiments.comparison import svg
from experiments.comparison.curves import Chart
from experiments.comparison.tables import Table

__all__ = ["render"]

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2128;--soft:#5b6470;--line:#d9dee4;--paper:#fff;--card:#f6f8fa}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaef;--soft:#9aa4b0;--line:#363d47;--paper:#14181d;--card:#1d232a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem clamp(.8rem,3vw,2rem) 3rem;max-width:70rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.4rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
h3{font-size:1rem;margin:1.4rem 0 .3rem}p{margin:.3rem 0}.soft{color:var(--soft)}
.notes{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.5rem .8rem .5rem 1.8rem}
.scroll{overflow-x:auto}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:.4rem 1.6rem}
.figure{min-width:0}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;margin:.4rem 0}
th,td{padding:.2rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:bottom}
td{white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
@media print{:root{--ink:#000;--soft:#444;--line:#bbb;--paper:#fff;--card:#f4f4f4}
body{font-size:11px;max-width:none;padding:0}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
.figure,tr{break-inside:avoid}h2,h3{break-after:avoid}.chart{height:11rem}}
"""


def render(
    title: str, subtitle: str, best: Table, every: Table, fixed: Table, notes: Sequence[str], drawn: Sequence[Chart]
) -> str:
    """The page; the tables are of :mod:`experiments.comparison.tables`."""
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(subtitle)}</p>', _table(best)]
    if notes:
        parts.append(f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>')
    if drawn:
        parts.append("<h2>Curves</h2>")
        parts.append('<p class="soft">Each optimizer at its best setting, the mean over seeds; bands reach from the '
                     "lowest seed to the highest.</p>")  # fmt: skip
        parts += ['<div class="figures">', *map(svg.draw, drawn), "</div>"]
    parts.append(f"<details><summary>All settings</summary>{_table(every)}</details>")
    parts.append(f"<details><summary>What was held fixed</summary>{_table(fixed)}</details>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{svg.STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
