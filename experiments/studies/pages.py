"""A study as JSON, as a page of Markdown and as figures; page and figures are made of the JSON alone."""

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.comparison.environment import describe
from experiments.comparison.plan import Plan
from experiments.studies import projection_page, spectrum_page, updates_page

__all__ = ["described", "write_pages", "write_study"]

_PAGES = {"projection": projection_page, "spectrum": spectrum_page, "updates": updates_page}


def described(study: str, argv: Sequence[str], plans: Sequence[Plan], device: torch.device) -> dict[str, Any]:
    """What a study was made by: the head of its JSON."""
    return {
        "study": study,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python experiments/study.py", *map(_without_machine, argv)]),
        "environment": {**describe(device), "processor": _processor()},
        "plans": {
            plan.name: {
                "task": plan.task.identity(),
                "training": dataclasses.asdict(plan.training),
                "trainer": {"optimizer": plan.settings[0].optimizer, **plan.settings[0].options},
                "seeds": list(plan.seeds),
            }
            for plan in plans
        },
    }


def write_study(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """The JSON, the page and the figures, by the study's name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['study']}.json"
    text = json.dumps(result, indent=1, allow_nan=False)
    # One line for each list of numbers, and for each list of such lists.
    for pattern in (r"\[[^\[\]{}]*\]", r"\[(\s*\[[^\[\]{}]*\],?)+\s*\]"):
        text = re.sub(pattern, lambda found: re.sub(r"\s+", " ", found[0]), text)
    path.write_text(text + "\n", encoding="utf-8")
    return [path, *write_pages(result, folder)]


def write_pages(result: Mapping[str, Any], folder: Path) -> list[Path]:
    study = _PAGES[result["study"]]
    figures = study.draw(result, folder)
    path = folder / f"{result['study']}.md"
    sections = [f"# {study.TITLE}", _head(result), *study.sections(result, [figure.name for figure in figures])]
    path.write_text("\n\n".join(section.strip() for section in sections) + "\n", encoding="utf-8")
    return [path, *figures]


def _head(result: Mapping[str, Any]) -> str:
    environment = result["environment"]
    shown = ("python", "torch", "transformers")
    versions = ", ".join(f"{name} {environment[name]}" for name in shown if name in environment)
    lines = [
        f"```\n{result['command']}\n```\n",
        f"Made on {result['created'][:10]} in {result['seconds'] / 60:.0f} minutes: {environment['device']} "
        f"({environment['processor']}), {versions}. The numbers are in {result['study']}.json.\n",
    ]
    for name, plan in result["plans"].items():
        training, trainer = plan["training"], dict(plan["trainer"])
        options = ", ".join(f"{option} {value}" for option, value in trainer.items() if option != "optimizer")
        lines.append(
            f"- {name} (experiments/configs/studies/{name}.yaml): {training['steps']} steps of "
            f"{training['batch_size']} examples by {trainer['optimizer']} ({options}, {training['schedule']} schedule, "
            f"gradients clipped to {training['max_grad_norm']}), seed {', '.join(map(str, plan['seeds']))}."
        )
    return "\n".join(lines)


def _without_machine(argument: str) -> str:
    """A folder without those above it, which are of one machine."""
    name, separator, folder = argument.rpartition("=")
    return f"{name}{separator}path/to/{Path(folder).name}" if Path(folder).is_absolute() else argument


def _processor() -> str:
    """As Linux calls it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown processor"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else "unknown processor"
