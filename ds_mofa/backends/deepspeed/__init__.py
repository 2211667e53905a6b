"""The DeepSpeed backend: ``"type": "MoFaSGD"``, or another name of the registry, through ``deepspeed.initialize``.

versions.py       which DeepSpeed may be installed, and what another one is told
older.py          what stands in for parts that DeepSpeed has not had from the beginning
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

Importing this registers; :func:`register` again does nothing.
"""

import deepspeed

from ds_mofa.backends.deepspeed import versions

__all__ = ["register"]

_registered = False


def register() -> None:
    """Add the names and wrap the engine's methods, once a process; later calls do nothing.

    A DeepSpeed that is too old or too new for that is told so when it is to train with one of the names.
    """
    global _registered
    if _registered:
        return
    _registered = True
    why = versions.problem(deepspeed.__version__)
    if why is None:
        try:
            from ds_mofa.backends.deepspeed import registration

            registration.join()
            return
        except (ImportError, AttributeError) as error:
            why = (
                f"DeepSpeed {deepspeed.__version__} has not what ds_mofa counts on ({error}): "
                f"pip install deepspeed=={versions.NEWEST}"
            )
    versions.refuse_when_used(why)


# Not left to who imports this: whoever is first to import deepspeed may be a module of this package, and then ds_mofa is
# told of it while that is half imported.
register()
