"""The DeepSpeed backend: `"type": "MoFaSGD"` or `"GaLore"` through `deepspeed.initialize`, for every ZeRO stage.

registration.py   the name, and the engine's methods that are wrapped
build.py          from an engine and its config to the optimizer, and what is refused there
takeover.py       one engine after the other on one model, and optimizers that were built outside of an engine
matrices.py       a matrix as DeepSpeed meets it: its shards, and what accessors are told
dropped.py        gradients that a script drops between backward and step
zero.py           ZeRO stages 1 to 3: mixins over the optimizers that DeepSpeed builds
replicated.py     stage 0, in fp32 and bf16
checkpoints.py    whether a checkpoint is whole and fits, before anything is loaded
universal.py      universal checkpoints: another number of ranks, another stage
"""

from ds_mofa.deepspeed.registration import register

__all__ = ["register"]
