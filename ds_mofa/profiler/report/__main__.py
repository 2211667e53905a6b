"""Write the pages and the figures of a report.json anew, beside it.

python -m ds_mofa.profiler.report profiling/results/memory/report.json
"""

import argparse
import json
from pathlib import Path

from ds_mofa.profiler.report.data import check
from ds_mofa.profiler.report.memory import write_pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="of one run, or of profiling/verify_claim.py")
    path = parser.parse_args().report
    document = json.loads(path.read_text(encoding="utf-8"))
    runs = document["runs"] if "runs" in document else {document["setting"].get("name", "run"): document}
    for report in runs.values():
        if "ranks" in report:
            check(report)
    written = write_pages(runs, path.parent, document, document.get("claims", ()), title=_title(path.parent))
    print("wrote " + ", ".join(str(file) for file in written if file.name != "report.json"))


def _title(folder: Path) -> str | None:
    """The one that the Markdown has, which a report's data do not hold."""
    old = folder / "report.md"
    if not old.is_file():
        return None
    return old.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


if __name__ == "__main__":
    main()
