"""Pages of runs, one beside the other, and what differs between two.

    ds-mofa report out/memory/report.json                       # its pages anew, beside it
    ds-mofa report a/memory/report.json b/memory/report.json    # one page of both in out/compare
    ds-mofa report --diff a/memory/report.json b/memory/report.json

Each file is a report.json of the memory profiler, of one run or of many (ds-mofa verify); FILE#NAME is one of its runs.
--diff prints two runs side by side, of which each may be a prediction (ds-mofa predict --output FILE): what was set otherwise,
and the memory by category, sorted by how far the two are apart. --output_dir writes that as a page, too.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_mofa.profiler.report.data import SCHEMA_VERSION
from ds_mofa.profiler.report.difference import difference
from ds_mofa.profiler.report.memory import write_pages
from ds_mofa.profiler.report.rendering import markdown, write
from ds_mofa.profiler.report.runs import is_prediction, one_run, read_runs

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ds-mofa report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", nargs="*", metavar="REPORT", help="files, any number of them")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="print what differs between two runs")
    parser.add_argument("--output_dir", type=Path, help="of the page; default out/compare, or beside a single report")
    parser.add_argument("--title", help="of the page")
    args = parser.parse_args(argv)
    if bool(args.reports) == bool(args.diff):
        parser.error("give reports for a page of them, or --diff A B")
    try:
        files = _diff(args.diff, args.output_dir) if args.diff else _page(args.reports, args.output_dir, args.title)
    except ValueError as error:
        sys.exit(f"ds-mofa report: error: {error}")
    if files:
        pages = [str(file) for file in files if file.suffix in (".md", ".html")]
        pictures = sum(file.suffix == ".png" for file in files)
        print(f"wrote {', '.join(pages)}" + (f" and {pictures} pictures" if pictures else ""))


def _diff(places: Sequence[str], folder: Path | None) -> list[Path]:
    first, second = places
    (name, one), (other_name, other) = one_run(first), one_run(second)
    if name == other_name:
        name, other_name = first, second
    document = difference((name, other_name), one, other)
    print(markdown(document, pictures=False))
    return write(document, folder, "report.md") if folder else []


def _page(places: Sequence[str], folder: Path | None, title: str | None) -> list[Path]:
    runs = read_runs(places)
    predictions = [name for name, run in runs.items() if is_prediction(run)]
    if predictions:
        raise ValueError(
            f"{', '.join(predictions)}: a prediction has no page. --diff compares two of them, or with a run"
        )
    if len(places) == 1 and "#" not in places[0]:
        document = json.loads(Path(places[0]).read_text(encoding="utf-8"))
        here = folder or Path(places[0]).parent
        return write_pages(runs, here, document, document.get("claims", ()), title or _title(here))
    created = max((run["created"] for run in runs.values() if "created" in run), default=None)
    data: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "kind": "runs", "created": created, "runs": runs}
    return write_pages(runs, folder or Path("out/compare"), data, title=title or f"Memory of {len(runs)} training runs")


def _title(folder: Path) -> str | None:
    """The one that the Markdown has, which a report's data do not hold."""
    old = folder / "report.md"
    if not old.is_file():
        return None
    return old.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
