"""The tasks by the name that a YAML gives them."""

from experiments.comparison.tasks.answers import Answers
from experiments.comparison.tasks.base import Task
from experiments.comparison.tasks.lm import LanguageModelling
from experiments.comparison.tasks.sst2 import Sst2

__all__ = ["TASKS", "Task"]

TASKS: dict[str, type[Task]] = {"sst2": Sst2, "lm": LanguageModelling, "answers": Answers}
