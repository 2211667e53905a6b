"""Where the memory of a training run goes: measured, predicted, and shown.

setting.py       RunSetting: what a run is, for all that measure, predict or count; spelling.py, how it is written
measure/         MemoryProfiler around a loop: meters, phases, one step allocation by allocation
predict/         the same categories without a GPU
report/          the report as data, text, HTML and PNG
claims.py        what is claimed of MoFaSGD's memory, and whether measured runs bear it out
storages.py      pieces of memory with birth and death; categories.py, what they are counted as
outside.py       what lies outside of the allocator
"""

from ds_mofa.profiler.categories import CATEGORIES, gb
from ds_mofa.profiler.measure.profiler import MemoryProfiler
from ds_mofa.profiler.report import load_report

__all__ = ["CATEGORIES", "MemoryCallback", "MemoryProfiler", "gb", "load_report"]


def __getattr__(name: str):
    if name == "MemoryCallback":  # needs transformers, an extra, which the rest does not
        from ds_mofa.profiler.measure.callback import MemoryCallback

        return MemoryCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
