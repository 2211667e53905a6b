"""Reports as Markdown, as an HTML page and as figures: of memory here, of comparisons in experiments/.

data.py          the report of a run as data; masking.py, the secrets of its command line
memory.py        that as a document, and its files
document.py      a report as a tree of sections, tables and charts; charts.py, what a chart shows
rendering.py     a document as files, by the Jinja2 templates in templates/
drawing.py       charts by matplotlib, which is an extra; styles.py, colours, dashes and markers
units.py         bytes in B, kB, MB or GB

`python -m ds_mofa.profiler.report REPORT.json` writes pages and figures of a report anew.
"""

from ds_mofa.profiler.report.data import SCHEMA_VERSION, assemble, check, environment, load_report
from ds_mofa.profiler.report.memory import write_pages, write_report

__all__ = ["SCHEMA_VERSION", "assemble", "check", "environment", "load_report", "write_pages", "write_report"]
