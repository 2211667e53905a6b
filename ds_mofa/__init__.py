"""MoFaSGD: full-parameter training at LoRA's memory. Importing this makes it and GaLore known to DeepSpeed, as soon as
that is imported.
"""

import torch

from ds_mofa.optimizers.for_trainer import ForTrainer
from ds_mofa.optimizers.galore import GaLore
from ds_mofa.optimizers.graphed import GraphedMicroBatch
from ds_mofa.optimizers.mofasgd import MoFaSGD
from ds_mofa.options import OptionError, Options
from ds_mofa_autoload import after_import

__version__ = "0.1.0"
__all__ = ["ForTrainer", "GaLore", "GraphedMicroBatch", "MoFaSGD", "OptionError", "Options"]

if torch.distributed.is_available():
    from ds_mofa.backends import ddp, fsdp2  # noqa: F401  which enter the list of engines


def _join_deepspeed() -> None:
    import ds_mofa.backends.deepspeed  # noqa: F401  which registers


after_import("deepspeed", _join_deepspeed)
