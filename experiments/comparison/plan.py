"""From a YAML to the runs of a comparison: every optimizer, every point of its grid, every seed."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.comparison.reading import checked, read_yaml, unknown
from experiments.comparison.tasks import TASKS, Task
from launch.errors import UserError

__all__ = ["Plan", "Run", "Setting", "Training", "load_plan"]

_SECTIONS = ("task", "training", "seeds", "optimizers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What is the same for all optimizers.

    Attributes:
        steps: optimizer steps.
        batch_size: examples of a step.
        eval_every: steps between two evaluations; there is one before the first step and one after the last.
        schedule: of the learning rate, from its peak after the warm-up to 0 at the end, or constant.
        warmup_steps: over which the learning rate rises linearly from 0.
        max_grad_norm: clip the gradient to this norm; null: do not clip.
        dtype: of the weights and of the computation.
        matmul: fp32, or tf32 for the model's fp32 products on a GPU, forward and backward; optimizers compute in fp32.
    """

    steps: int
    batch_size: int
    eval_every: int
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    matmul: Literal["fp32", "tf32"] = "fp32"

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name}: {getattr(self, name)} must be at least 1.")
        if not 0 <= self.warmup_steps < self.steps:
            raise UserError(f"training.warmup_steps: {self.warmup_steps} must be >= 0 and < steps ({self.steps}).")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"training.max_grad_norm: {self.max_grad_norm} must be > 0, or null for no clipping.")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A point of an optimizer's grid.

    Attributes:
        label: the name of its row in the table, which all points of a grid share.
        optimizer: the name by which it is built.
        options: what it is built with, ``lr`` among them.
        grid: names of the options that the YAML gives several values for.
    """

    label: str
    optimizer: str
    options: Mapping[str, Any]
    grid: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([self.label, *(f"{name}={_short(self.options[name])}" for name in self.grid)])


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a setting and a seed. ``key`` stands for all that decides its outcome."""

    setting: Setting
    seed: int
    training: Training
    key: str

    def __str__(self) -> str:
        return f"{self.setting}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        """Its name in letters that any file system and shell takes."""
        return re.sub(r"[^\w.]+", "-", str(self))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole comparison; ``name`` is that of its file, ``identity`` its task's."""

    name: str
    task: Task
    identity: Mapping[str, Any]
    training: Training
    seeds: tuple[int, ...]
    settings: tuple[Setting, ...]
    runs: tuple[Run, ...]

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(setting.label for setting in self.settings))

    def with_settings(self, settings: Sequence[Setting], seeds: Sequence[int]) -> "Plan":
        """The same comparison of other settings and seeds."""
        runs = _runs(self.identity, self.training, settings, seeds)
        return dataclasses.replace(self, settings=tuple(settings), seeds=tuple(seeds), runs=runs)

    def run(self, setting: Setting, seed: int) -> Run:
        return next(run for run in self.runs if run.setting is setting and run.seed == seed)


def load_plan(
    path: Path,
    data_dir: Path | None = None,
    labels: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    pretrained: str | None = None,
    identify: bool = True,
) -> Plan:
    """Read a comparison.

    Args:
        data_dir: folder of the data; None: the one that the YAML names.
        labels: optimizers to keep, by the YAML's names for them; None: all.
        seeds: seeds to keep; None: all.
        pretrained: the model to start from, instead of the one that the YAML names.
        identify: read the task's data, which the keys of the runs depend on. Without, the keys fit no results.

    Raises:
        UserError: something in it is unknown, missing, of the wrong type or out of its range; says which.
    """
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must be a mapping with {', '.join(_SECTIONS)}.")
    for section in content:
        if section not in _SECTIONS:
            raise UserError(unknown(section, _SECTIONS, f"{path}: no section"))
    missing = [section for section in _SECTIONS if section not in content]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} must be given. See experiments/configs/comparisons/smoke.yaml.")
    given = {"data_dir": data_dir and str(data_dir), "pretrained": pretrained}
    task = _task(content["task"], given, f"{path}: task")
    training = checked(Training, content["training"], f"{path}: training")
    settings = _settings(content["optimizers"], f"{path}: optimizers")
    kept_labels = _kept(labels, list(dict.fromkeys(setting.label for setting in settings)), "--optimizers")
    settings = [setting for setting in settings if setting.label in kept_labels]
    kept_seeds = _kept(seeds, _seeds(content["seeds"], f"{path}: seeds"), "--seeds")
    identity = task.identity() if identify else {"name": task.name}
    runs = _runs(identity, training, settings, kept_seeds)
    _check_different(runs, f"{path}: optimizers")
    return Plan(path.stem, task, identity, training, tuple(kept_seeds), tuple(settings), runs)


def _task(section: Any, given: Mapping[str, str | None], where: str) -> Task:
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        raise UserError(f"{where}: must be a mapping with a name, one of {', '.join(TASKS)}.")
    options = {name: value for name, value in section.items() if name != "name"}
    if section["name"] not in TASKS:
        raise UserError(unknown(section["name"], TASKS, f"{where}: no task"))
    options |= {name: value for name, value in given.items() if value is not None}
    return checked(TASKS[section["name"]], options, where)


def _settings(section: Any, where: str) -> list[Setting]:
    """The grid of every optimizer, each option with a list of values being an axis."""
    if not isinstance(section, Mapping) or not section:
        raise UserError(f"{where}: must be a mapping from names to options, such as AdamW: {{lr: [1e-4, 3e-4]}}.")
    settings = []
    for label, options in section.items():
        here = f"{where}.{label}"
        if not isinstance(options, Mapping) or "lr" not in options:
            raise UserError(f"{here}: must be a mapping with an lr, for no default is fair to every task.")
        if not isinstance(options.get("optimizer", ""), str):
            raise UserError(
                f"{here}.optimizer: {options['optimizer']!r} must be one name. Give each an entry of its own."
            )
        axes = {name: value for name, value in options.items() if isinstance(value, list)}
        for name, values in axes.items():
            if not values or any(values.count(value) > 1 for value in values):
                raise UserError(f"{here}.{name}: {values!r} must be one or several values, no two the same.")
        for point in itertools.product(*axes.values()):
            chosen = {**options, **dict(zip(axes, point))}
            optimizer = chosen.pop("optimizer", label)
            grid = tuple(name for name, values in axes.items() if len(values) > 1)
            settings.append(Setting(str(label), optimizer, chosen, grid))
    return settings


def _runs(
    identity: Mapping[str, Any], training: Training, settings: Sequence[Setting], seeds: Sequence[int]
) -> tuple[Run, ...]:
    # Seeds outside, settings inside: what an interruption leaves is a complete comparison over fewer seeds.
    return tuple(
        Run(setting, seed, training, _key(identity, training, setting, seed)) for seed in seeds for setting in settings
    )


def _check_different(runs: Sequence[Run], where: str) -> None:
    first: dict[str, Run] = {}
    for run in runs:
        if first.setdefault(run.key, run) is not run:
            raise UserError(f"{where}: {first[run.key]} and {run} are the same run. Remove one of them.")


def _seeds(section: Any, where: str) -> list[int]:
    valid = isinstance(section, list) and section and all(type(seed) is int and 0 <= seed < 2**31 for seed in section)
    if not valid or len(set(section)) < len(section):
        raise UserError(
            f"{where}: {section!r} must be a list of different whole numbers >= 0 and < 2^31, such as [0, 1]."
        )
    return section


def _kept(wanted: Sequence | None, known: Sequence, option: str) -> list:
    for item in wanted or ():
        if item not in known:
            raise UserError(unknown(item, map(str, known), f"{option}: the YAML has no"))
    return [item for item in known if wanted is None or item in wanted]


def _key(identity: Mapping[str, Any], training: Training, setting: Setting, seed: int) -> str:
    """A hash of everything that a run depends on but the code; the label is a name, and is not among it."""
    content = {
        "task": identity,
        "training": dataclasses.asdict(training),
        "optimizer": setting.optimizer,
        "options": setting.options,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
