"""A moment of a step that may be the peak."""

import dataclasses

__all__ = ["Candidate"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A moment that may be the peak: bytes by category on top of what is always there."""

    when: str
    extra: dict[str, int]
