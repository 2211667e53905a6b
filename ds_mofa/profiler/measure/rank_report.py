"""The report of one rank, from its meters, its phases and its recorded step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_mofa.profiler.measure.accounting import account, thin_curve, thin_samples
from ds_mofa.profiler.measure.inventory import Known, sizes
from ds_mofa.profiler.measure.meters import Meters, this_rank
from ds_mofa.profiler.measure.phases import PhaseRecorder
from ds_mofa.profiler.measure.recorded import RecordedStep

__all__ = ["rank_report"]


def rank_report(
    meters: Meters,
    recorder: PhaseRecorder,
    recorded: RecordedStep,
    known: Sequence[Known],
    step_seconds: Sequence[float],
    steps: int,
    own_seconds: float,
    notes: Sequence[str],
    throughput: Mapping[str, float | None],
) -> dict[str, Any]:
    """Sizes in bytes.

    Args:
        known: the inventory at the end.
        step_seconds: of the steps but the recorded one.
        steps: how many there were.
        own_seconds: spent in the profiler's code in the steps but the recorded one.
        notes: sentences for the report.
        throughput: of the same steps; see :meth:`ds_mofa.profiler.measure.throughput.Throughput.report`.
    """
    samples, index, cuda = meters.sampler.samples, meters.nvml_index, meters.cuda
    nvml = [s.device_used[index] for s in samples if index is not None and index in s.device_used]
    process = [s.process_used[index] for s in samples if index is not None and index in s.process_used]
    curve = recorded.curve(recorder.spans)
    peaks: dict[str, int | None] = {
        "allocated": meters.allocated_peak if cuda else None,
        "allocated_while_building": meters.building_peak if cuda else None,
        "reserved": meters.reserved_peak if cuda else None,
        "traced": sum(curve.peak.values()) if curve is not None else None,
        "nvml_device": max(nvml, default=None),
        "nvml_process": max(process, default=None),
        "host": max(max(s.host for s in samples), *(int(e["peak_host"]) for e in recorder.statistics.values()), 0),
    }
    breakdown = account(
        cuda=cuda,
        peaks=peaks,
        at_peak=curve.peak if curve is not None else None,
        known=sizes(known, meters.device.type),
        before=meters.before,
        context=meters.context,
        communication=meters.communication(),
        base_host=meters.base_host,
    )
    missing = ["Without NVML's figures the sum ends at what the allocator has reserved."] if cuda and not nvml else []
    return {
        "rank": this_rank(),
        "device": torch.cuda.get_device_name(meters.device) if cuda else "CPU",
        "driver": meters.sampler.reader.driver,
        "measured": "device memory" if cuda else "host memory",
        "peaks": peaks,
        "breakdown": breakdown,
        "phases": [{"name": name, **entry} for name, entry in recorder.statistics.items()],
        "phase_peaks": recorded.phase_peaks(recorder.spans, recorder.inner),
        "peak": recorded.peak(curve, [*recorder.spans, *recorder.inner]),
        "layers": recorded.layers(recorder.spans),
        "steps": steps,
        "step_seconds": list(step_seconds),
        "throughput": dict(throughput),
        "sampling": {
            "hz_asked": meters.sampler.hz,
            "samples": len(samples),
            "longest_gap_seconds": meters.sampler.gap(),
            "thread_cpu_share": meters.sampler.cost / max((samples[-1].time - samples[0].time) / 1e9, 1e-9),
        },
        "overhead": {
            "seconds_per_step": own_seconds / max(len(step_seconds), 1),
            "share_of_step": own_seconds / max(sum(step_seconds), 1e-9),
        },
        "timeline": thin_samples(samples, index),
        "step_timeline": thin_curve(curve, recorder.spans, recorder.inner) if curve is not None else None,
        "notes": [*notes, *missing, *meters.sampler.problems],
    }
