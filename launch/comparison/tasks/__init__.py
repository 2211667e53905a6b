"""The tasks by the name that a YAML gives them."""

from launch.comparison.tasks.base import Task
from launch.comparison.tasks.lm import LanguageModelling
from launch.comparison.tasks.sst2 import Sst2

__all__ = ["TASKS", "Task"]

TASKS: dict[str, type[Task]] = {"sst2": Sst2, "lm": LanguageModelling}
