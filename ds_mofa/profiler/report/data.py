"""The report of a run as data: put together from all ranks, and checked."""

import datetime
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ds_mofa.profiler.categories import CATEGORIES
from ds_mofa.profiler.report.masking import masked

__all__ = ["SCHEMA_VERSION", "assemble", "check", "environment", "load_report"]

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
