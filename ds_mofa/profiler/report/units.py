"""Numbers of bytes as a reader takes them in: in B, kB, MB or GB, by their size, each 1000 of the one before."""

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Unit", "shown", "unit_of"]


class Unit(NamedTuple):
    """A unit that several numbers share.

    Attributes:
        name: "B", "kB", "MB" or "GB".
        bytes: of one of it.
        digits: behind the point, by which the largest of the numbers has three figures or more.
    """

    name: str
    bytes: float
    digits: int

    def number(self, size: float | None, digits: int | None = None) -> str:
        """``size`` bytes in this unit, without its name; a dash for what was not measured.

        Args:
            digits: behind the point, instead of the unit's own: more, where small parts are to add up to a large sum.
        """
        if size is None:
            return "-"
        digits = self.digits if digits is None or self.name == "B" else digits
        return f"{size / self.bytes:,.{digits}f}"


def unit_of(sizes: Iterable[float | None]) -> Unit:
    """The unit for all of these: that of the largest."""
    largest = max((abs(size) for size in sizes if size is not None), default=0)
    for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if largest >= size:
            return Unit(name, size, 2 if largest < 100 * size else 1)
    return Unit("B", 1, 0)


def shown(size: float | None) -> str:
    """One number of bytes with its own unit, such as "31.4 GB" or "512 B"; a dash for what was not measured."""
    if size is None:
        return "-"
    unit = unit_of([size])
    return f"{unit.number(size)} {unit.name}"
