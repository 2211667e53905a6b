"""What a run's memory will be, without a GPU.

prediction.py        predict: the peak of one rank by category
fitting.py           what fits a card: the longest sequence, the largest batch, the highest rank, and what each switch gains
plan.py              what is known of a run before any moment of it is looked at; always.py, what is there all the time
zero.py              DeepSpeed's settings, and how it cuts groups into partitions
moments.py           the moments that may be the peak; stage12.py and offload.py, those of ZeRO 1 and 2 and of offload
step_workspace.py    the temporaries of the optimizer step
simulated/           forward and backward of a micro-batch under fake tensors
reserved/            what the allocator will reserve: its rules played through, and the coordinator of ZeRO-3
"""

from ds_mofa.profiler.predict.prediction import PredictionError, predict

__all__ = ["PredictionError", "predict"]
