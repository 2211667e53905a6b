"""Which of a report's ranks is shown."""

from collections.abc import Mapping
from typing import Any

__all__ = ["fullest"]


def fullest(report: Mapping[str, Any]) -> dict[str, Any]:
    """The rank with the largest total."""
    return max(report["ranks"], key=lambda rank: rank["breakdown"]["total"])
