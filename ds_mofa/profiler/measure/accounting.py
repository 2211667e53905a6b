"""From meters to a sum: the bytes by category at the peak, adding up to what the outermost meter saw."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ds_mofa.profiler.categories import CATEGORIES
from ds_mofa.profiler.measure.curve import ROWS, Curve, Span
from ds_mofa.profiler.measure.sampler import Sample

__all__ = ["account", "thin_curve", "thin_samples"]

_POINTS = 400  # of a timeline in a report


def account(
    *,
    cuda: bool,
    peaks: Mapping[str, int | None],
    at_peak: Mapping[str, int] | None,
    known: Mapping[str, int],
    before: int | None,
    context: int | None,
    communication: int | None,
    base_host: int,
) -> dict[str, Any]:
    """The breakdown at the peak; all values in bytes.

    Args:
        cuda: whether a device was measured, or the host.
        peaks: ``allocated``, ``reserved``, ``nvml_device`` and ``host``.
        at_peak: what the history of the detailed step found at its own peak, by category; None without one.
        known: what the inventory counts, by category; used without a history.
        before: in use on the device before this process opened it.
        context: taken when it did.
        communication: taken from the driver while the communicators were made.
        base_host: resident set before the model.

    Returns:
        ``meter``: what the sum is of; ``total``: what it saw; ``categories``: bytes by category, which add up to it.
    """
    parts = dict(at_peak if at_peak is not None else known)
    if not cuda:
        total, meter = _of(peaks, "host"), "resident set of the process"
        parts["process base"] = base_host
    else:
        allocated, reserved, nvml = _of(peaks, "allocated"), _of(peaks, "reserved"), peaks["nvml_device"]
        parts["unexplained"] = parts.get("unexplained", 0) + allocated - sum(parts.values())
        parts["allocator slack"] = reserved - allocated
        total, meter = reserved, "PyTorch's allocator, reserved"
        if nvml is not None:
            total, meter = nvml, "NVML, in use on the device"
            parts["CUDA context"] = context or 0
            parts["before this process"] = before or 0
            if communication:
                parts["communication buffers"] = parts.get("communication buffers", 0) + communication
    parts["unexplained"] = parts.get("unexplained", 0) + total - sum(parts.values())
    return {
        "meter": meter,
        "total": total,
        "categories": {name: parts[name] for name in CATEGORIES if parts.get(name)},
    }


def thin_samples(samples: Sequence[Sample], index: int | None) -> dict[str, Any]:
    """The run over time: at most a few hundred points, each the largest of those it stands for.

    Returns:
        ``seconds`` since the first sample, and in bytes ``nvml_device``, ``nvml_process``, ``reserved``,
        ``allocated`` and ``host``; None where not measured.
    """
    start = samples[0].time
    bins = _bins(len(samples))

    def here(used: Mapping[int, int]) -> int | None:
        return None if index is None else used.get(index)

    def largest(values: list[int | None]) -> list[int | None]:
        rows = ([v for v in values[low:high] if v is not None] for low, high in bins)
        return [max(row, default=None) for row in rows]

    return {
        "seconds": [round((samples[low].time - start) / 1e9, 4) for low, _ in bins],
        "nvml_device": largest([here(s.device_used) for s in samples]),
        "nvml_process": largest([here(s.process_used) for s in samples]),
        "allocated": largest([s.allocator[0] if s.allocator else None for s in samples]),
        "reserved": largest([s.allocator[1] if s.allocator else None for s in samples]),
        "host": largest([s.host for s in samples]),
    }


def thin_curve(curve: Curve, spans: Sequence[Span], inner: Sequence[Span]) -> dict[str, Any]:
    """The detailed step over time, bytes by category; of each stretch its highest moment, so that no peak is lost."""
    bins = _bins(len(curve.times))
    highest = [max(range(low, high), key=curve.totals.__getitem__) for low, high in bins]
    start = curve.times[0]
    rows = [curve.rows[i] for i in highest]
    columns = {name: [row[k] for row in rows] for k, name in enumerate(ROWS)}
    shown = [span for span in inner if span.name != "capture"]
    return {
        "milliseconds": [round((curve.times[i] - start) / 1e6, 3) for i in highest],
        "categories": {name: column for name, column in columns.items() if any(column)},
        "peak_milliseconds": (curve.peak_time - start) / 1e6,
        "phases": [
            {
                "name": span.name,
                "start": round((span.start - start) / 1e6, 3),
                "end": round((span.end - start) / 1e6, 3),
            }
            for span in (*spans, *shown)
        ],
    }


def _of(peaks: Mapping[str, int | None], meter: str) -> int:
    """The peak of a meter that this kind of device always has."""
    peak = peaks[meter]
    assert peak is not None
    return peak


def _bins(count: int) -> list[tuple[int, int]]:
    edges = sorted(
        {round(i * count / _POINTS) for i in range(_POINTS + 1)} if count > _POINTS else set(range(count + 1))
    )
    return list(itertools.pairwise(edges))
