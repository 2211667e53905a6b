"""The optimizers that MoFaSGD is compared with, in one process, on exactly the tensors that MoFaSGD would train.

>>> optimizer = ds_mofa.peers.build("GaLore", model, lr=1e-2, rank=8, refresh_every=100)

Each method is a file here, whose docstring has its equations, its source and its memory; docs/peers.md compares them.
"""

from ds_mofa.peers.accounting import state_bytes
from ds_mofa.peers.registry import build, names

__all__ = ["build", "names", "state_bytes"]
