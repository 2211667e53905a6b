"""The optimizers that MoFaSGD is compared with, in one process, on exactly the tensors that MoFaSGD would train.

>>> optimizer = experiments.baselines.build("GaLore", model, lr=1e-2, rank=8, refresh_every=100)

Each method is a file here, whose docstring has its equations, its source and its memory; docs/baselines.md compares
them.
"""

from experiments.baselines.accounting import state_bytes
from experiments.baselines.registry import build, names

__all__ = ["build", "names", "state_bytes"]
