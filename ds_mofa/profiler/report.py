"""A report as data: put together from all ranks, checked, and written as JSON, Markdown, HTML and PNG."""

import datetime
import importlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ds_mofa.profiler import markdown, page
from ds_mofa.profiler.categories import CATEGORIES
from ds_mofa.profiler.masking import masked

__all__ = ["SCHEMA_VERSION", "assemble", "check", "load_report", "write_pages", "write_report"]

SCHEMA_VERSION = 1
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "liger-kernel", "triton", "ds_mofa", "nvidia-ml-py")


def assemble(
    ranks: Sequence[dict[str, Any]], setting: Mapping[str, Any], predicted: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The report of one run from those of its ranks."""
    notes = [(rank["rank"], note) for rank in ranks for note in rank["notes"]]
    texts = dict.fromkeys(note for _, note in notes)
    many = len(ranks) > 1
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "run",
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": masked(sys.argv),
        "setting": dict(setting),
        "environment": environment(),
        "measured": ranks[0]["measured"],
        "ranks": list(ranks),
        "predicted": dict(predicted) if predicted else None,
        "notes": [
            (f"rank {', '.join(str(r) for r, n in notes if n == text)}: " if many else "") + text for text in texts
        ],
    }


def environment() -> dict[str, str]:
    """Versions of what decides the figures."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES[1:]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check(report: Mapping[str, Any]) -> None:
    """That a report can be read by this version and adds up.

    Raises:
        ValueError: another schema version, an unknown category, or a breakdown whose sum is not what its meter saw.
    """
    version = report.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"the report has schema version {version}, this ds_mofa reads {SCHEMA_VERSION}: use the version of ds_mofa "
            "that wrote it, or measure again"
        )
    for rank in report["ranks"]:
        breakdown = rank["breakdown"]
        unknown = set(breakdown["categories"]) - set(CATEGORIES)
        if unknown:
            raise ValueError(f"rank {rank['rank']}: unknown categories {sorted(unknown)}; known are {list(CATEGORIES)}")
        counted = sum(breakdown["categories"].values())
        if counted != breakdown["total"]:
            raise ValueError(
                f"rank {rank['rank']}: the categories add up to {counted} bytes, {breakdown['meter']} saw "
                f"{breakdown['total']}: the report has been edited or is damaged"
            )


def load_report(path: str | Path) -> dict[str, Any]:
    """Read a report.json.

    Raises:
        ValueError: it is no report of this version; see :func:`check`.
    """
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    check(report)
    return report


def write_report(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write report.json, report.md, report.html and, with matplotlib, a PNG of each figure; returns the files.

    Raises:
        ValueError: see :func:`check`.
    """
    check(report)
    return write_pages({report["setting"].get("name", "run"): report}, folder, report)


def write_pages(
    runs: Mapping[str, dict[str, Any]],
    folder: str | Path,
    document: dict[str, Any],
    claims: Sequence[Mapping[str, Any]] = (),
    title: str = "Memory of a training run",
) -> list[Path]:
    """Write one or several runs side by side.

    Args:
        runs: reports by name.
        folder: made where it is missing.
        document: what report.json holds.
        claims: verdicts, see ``profiling/verify_claim.py``.
        title: of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _figures(runs, folder, document)
    files = {
        "report.json": json.dumps(document, separators=(",", ":")) + "\n",
        "report.md": markdown.render(runs, claims, title, document, [path.name for path in pictures]),
        "report.html": page.render(runs, claims, title, document),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files] + pictures


def _figures(runs: Mapping[str, dict[str, Any]], folder: Path, document: dict[str, Any]) -> list[Path]:
    try:
        figures = importlib.import_module("ds_mofa.profiler.figures")
    except ImportError as error:
        note = f"No PNG: {error}. Install matplotlib (pip install 'ds_mofa[profile]'), or use report.html"
        document.setdefault("notes", []).append(note)
        return []
    return figures.write(runs, folder)
