"""Reports as Markdown, as an HTML page and as figures: of memory here, of comparisons in experiments/.

data.py          the report of a run as data; masking.py, the secrets of its command line; runs.py, what lies in files
comparing.py     any number of runs, a row each; difference.py, two of them; speed.py, their speed and energy
memory.py        that as a document, and its files
document.py      a report as a tree of sections, tables and charts; charts.py, what a chart shows
rendering.py     a document as files, by the Jinja2 templates in templates/
drawing.py       charts by matplotlib, which is an extra; styles.py, colours, dashes and markers
units.py         bytes in B, kB, MB or GB

`ds-mofa report` (command.py) writes pages of reports, and prints what differs between two.
"""

from ds_mofa.profiler.report.data import SCHEMA_VERSION, assemble, check, environment, load_report
from ds_mofa.profiler.report.memory import write_pages, write_report

__all__ = ["SCHEMA_VERSION", "assemble", "check", "environment", "load_report", "write_pages", "write_report"]
