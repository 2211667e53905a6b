"""The profiler as a callback of HF's ``Trainer`` (and TRL's)."""

from transformers import TrainerCallback

from ds_mofa.profiler.measure.profiler import MemoryProfiler

__all__ = ["MemoryCallback"]


class MemoryCallback(TrainerCallback):
    """Profiles a ``Trainer`` from the first step to the end of training.

    >>> profiler = MemoryProfiler(output_dir="out/memory").start()   # before the model is built
    >>> trainer = Trainer(..., callbacks=[MemoryCallback(profiler)])

    Args:
        profiler: started, if it is to see the memory from before the first allocation; otherwise it starts with
            training.
    """

    def __init__(self, profiler: MemoryProfiler):
        self.profiler = profiler

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not self.profiler.running:
            self.profiler.start()
        self.profiler.watch(model, optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        self.profiler.step()

    def on_train_end(self, args, state, control, **kwargs):
        self.profiler.stop()
