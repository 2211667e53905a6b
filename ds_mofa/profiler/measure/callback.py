"""The profiler as a callback of HF's ``Trainer`` (and TRL's)."""

import functools
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ds_mofa.profiler.measure.of_trainer import predict_beside, setting_of
from ds_mofa.profiler.measure.profiler import MemoryProfiler

__all__ = ["MemoryCallback"]


class MemoryCallback(TrainerCallback):
    """Profiles a ``Trainer`` from the first step to the end of training.

    >>> profiler = MemoryProfiler(output_dir="out/memory").start()   # before the model is built
    >>> trainer = Trainer(..., callbacks=[MemoryCallback(profiler)])

    At the end a process of its own predicts the memory of the largest forward that there was, and the report sets that beside
    what was measured, or a note says why not: under FSDP, with frozen parameters, with weights that are not in bf16.

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
        own = model
        while isinstance(getattr(own, "module", None), nn.Module):
            own = own.module

        def predicted(shape: tuple[int, int], loss: str) -> dict[str, Any]:
            folder = self.profiler.output_dir
            folder.mkdir(parents=True, exist_ok=True)
            make = functools.partial(setting_of, args, own, optimizer, folder / "model_config.json", shape, loss)
            return predict_beside(make, folder / "predicted.json")

        self.profiler.predictor = predicted

    def on_step_end(self, args, state, control, **kwargs):
        self.profiler.step()

    def on_train_end(self, args, state, control, **kwargs):
        self.profiler.stop()
