"""What a run's memory is, measured.

profiler.py      MemoryProfiler, the context manager around a loop; callback.py, the same for HF's Trainer
meters.py        the sampler, the allocator's counters, what the driver gives beyond them
sampler.py       NVML (nvml.py) and the host's memory, on a thread
phases.py        forward, backward and the parts of the optimizer step; NVTX
inventory.py     which storage is what
recorded.py      one step, allocation by allocation; history.py, from PyTorch's allocator
curve.py         what each of these was, and what was alive when
peak.py          what stood at its peak, with the stack
out_of_memory.py what has grown, when the memory runs out
layers.py        what is alive after each layer's backward
throughput.py    tokens, seconds and joules of the steps; flops.py, what share of a card that is
of_trainer.py    what run HF's Trainer is, for a prediction beside it
accounting.py    from meters to a sum by category
rank_report.py   all of it as data
"""
