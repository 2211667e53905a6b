"""Runs as they lie in files: reports, the runs of a comparison in one file, predictions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_mofa.profiler.report.data import check

__all__ = ["is_prediction", "one_run", "read_runs", "settings_of"]

# What a report's setting holds beside the setting, and options of a command that say only how it is called and where files are.
_MEASURED = ("seconds_per_step", "seconds_per_step_without_profiler", "all_seconds", "name")
_PLACES = ("run", "output_dir", "predicted", "result", "local_rank", "reuse")


def read_runs(places: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reports and predictions by name, in their order; of a run that failed ``{"error": why}``.

    Args:
        places: files: report.json of one run, or of profiling/verify_claim.py, or what ``ds-mofa predict --output`` has
            written. ``FILE#NAME`` is one of the runs in a file.

    Raises:
        ValueError: there is no such file or run, or it is none of these.
    """
    found: dict[str, dict[str, Any]] = {}
    for place in places:
        for name, run in _read(place).items():
            folder = Path(place.partition("#")[0]).resolve().parent
            for unique in (name, f"{name} ({folder.name})", f"{name} ({place})"):
                if unique not in found:
                    break
            found[unique] = run
    return found


def one_run(place: str) -> tuple[str, dict[str, Any]]:
    """The run that ``place`` holds, with its name.

    Raises:
        ValueError: see :func:`read_runs`; or it holds several, or one that failed.
    """
    runs = _read(place)
    if len(runs) > 1:
        raise ValueError(f"{place} holds {len(runs)} runs: choose one, such as '{place}#{next(iter(runs))}'. "
                         f"There are {', '.join(runs)}")  # fmt: skip
    [(name, run)] = runs.items()
    if "error" in run:
        raise ValueError(f"{place}: {name} has not been measured ({run['error']})")
    return name, run


def is_prediction(run: Mapping[str, Any]) -> bool:
    return "categories" in run


def settings_of(run: Mapping[str, Any]) -> dict[str, str]:
    """All that is known of how a run was set, as text: fields, options of its command, devices, versions."""
    if is_prediction(run):
        return {name: _text(value) for name, value in run["setting"].items()}
    found = dict((run.get("predicted") or {}).get("setting", {}))
    found |= {name: value for name, value in run["setting"].items() if name not in _MEASURED}
    found |= {f"--{name}": value for name, value in _options(run.get("command") or []).items() if name not in found}
    found |= {"ranks": len(run["ranks"]), "device": run["ranks"][0]["device"]}
    found |= {f"{name} (version)": version for name, version in run["environment"].items()}
    return {name: _text(value) for name, value in found.items()}


def _read(place: str) -> dict[str, dict[str, Any]]:
    path, _, wanted = place.partition("#")
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    runs = _runs_in(document, Path(path))
    if not runs or not all(isinstance(run, dict) for run in runs.values()):
        raise ValueError(f"{path} is no report.json, and no prediction of ds-mofa predict --output")
    for name, run in runs.items():
        if "ranks" in run:
            check(run)
        elif "error" not in run and not ("total" in run and is_prediction(run)):
            raise ValueError(f"{path}: {name} is neither a report nor a prediction")
    if not wanted:
        return runs
    if wanted not in runs:
        raise ValueError(f"{path} holds no run {wanted!r}; there are {', '.join(runs)}")
    return {wanted: runs[wanted]}


def _runs_in(document: Any, path: Path) -> dict[str, Any]:
    if not isinstance(document, dict):
        return {}
    if "runs" in document:
        return document["runs"]
    if "ranks" in document:
        return {document["setting"].get("name") or path.resolve().parent.name: document}
    return document


def _options(command: Sequence[str]) -> dict[str, str]:
    """Of ``--name value...`` and ``--name=value``; a name without values is "on"."""
    found: dict[str, str] = {}
    name = ""
    for word in command:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            found[name] = value if equals else ""
        elif name:
            found[name] = f"{found[name]} {word}".strip()
    return {name: value or "on" for name, value in found.items() if name not in _PLACES}


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
