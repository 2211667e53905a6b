"""Where the memory of a training run goes: measured, predicted, and shown.

profiler.py      MemoryProfiler, the context manager around a loop; callback.py, the same for HF's Trainer
sampler.py       NVML and the host's memory, on a thread
phases.py        forward, backward and the parts of the optimizer step; NVTX
inventory.py     which storage is what
trace.py         every allocation of one step, and what was alive when
layers.py        what is alive after each layer's backward
accounting.py    from meters to a sum by category
report/          the report as data, text, HTML and PNG
predict.py       the same categories without a GPU; simulate.py, zero.py: forward and backward, ZeRO's buffers
"""

from ds_mofa.profiler.categories import CATEGORIES, gb
from ds_mofa.profiler.profiler import MemoryProfiler
from ds_mofa.profiler.report import load_report

__all__ = ["CATEGORIES", "MemoryCallback", "MemoryProfiler", "gb", "load_report"]


def __getattr__(name: str):
    if name == "MemoryCallback":  # needs transformers, which the rest does not
        from ds_mofa.profiler.callback import MemoryCallback

        return MemoryCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
