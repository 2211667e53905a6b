"""Kernels as ``torch.profiler`` has them in its events."""

from types import SimpleNamespace


def kernel(name: str, start: float, end: float) -> SimpleNamespace:
    """One that ran from ``start`` to ``end``, microseconds."""
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))
