"""The DeepSpeed backend: ``"type": "MoFaSGD"``, or another name of the registry, through ``deepspeed.initialize``.

surface.py        every private name of DeepSpeed's that is used here, and every method that is wrapped or overridden
registration.py   the optimizers' names, and the engine's methods that are wrapped
backend.py        the engine as the step sees it: its process group, its weights, its host memory
build.py          from an engine and its config to the optimizer, and what is refused there
takeover.py       one engine after the other on one model, and optimizers that were built outside of an engine
matrices.py       a matrix as DeepSpeed meets it: its shards, and what accessors are told
dropped.py        gradients that a script drops between backward and step
zero.py           ZeRO stages 1 to 3: mixins over the optimizers that DeepSpeed builds
gradients/        how the gradients of AdamW's part travel in stages 1 and 2
replicated.py     stage 0, in fp32 and bf16
bases.py          what the mixins count on in DeepSpeed's optimizers, for type checkers
checkpoints.py    whether a checkpoint is whole and fits, before anything is loaded
universal.py      universal checkpoints: another number of ranks, another stage
"""

from ds_mofa.backends.deepspeed.registration import register

__all__ = ["register"]
