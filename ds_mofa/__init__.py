"""MoFaSGD: full-parameter training at LoRA's memory. Importing this makes it and GaLore known to DeepSpeed."""

import importlib.util

import torch

from ds_mofa.optimizers.for_trainer import ForTrainer
from ds_mofa.optimizers.galore import GaLore
from ds_mofa.optimizers.mofasgd import MoFaSGD
from ds_mofa.options import OptionError, Options

__version__ = "0.1.0"
__all__ = ["ForTrainer", "GaLore", "MoFaSGD", "OptionError", "Options"]

if torch.distributed.is_available():
    from ds_mofa.backends import ddp, fsdp2  # noqa: F401  which enter the list of engines

if importlib.util.find_spec("deepspeed") is not None:
    from ds_mofa.backends.deepspeed import register

    register()
