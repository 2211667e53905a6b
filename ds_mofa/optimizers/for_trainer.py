"""The door of Hugging Face's Trainer: an optimizer that is made of the model, whatever the trainer does with that later.

Under FSDP the Trainer refuses ``optimizers=``, and what it builds itself gets parameters and no model. What it is given as
``optimizer_cls_and_kwargs`` and is no optimizer class it calls with the model:

>>> trainer = Trainer(
...     model=model, args=args, train_dataset=data,
...     optimizer_cls_and_kwargs=(ds_mofa.ForTrainer, {"lr": 1e-4, "rank": 32}),
... )

So it goes in one process, under DistributedDataParallel and under FSDP2, for TRL's trainers too. Under DeepSpeed the JSON
names the optimizer.
"""

from typing import Any

from torch import nn

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.registry import entry_of

__all__ = ["ForTrainer"]


class ForTrainer:
    """Makes an optimizer of a model; see the module."""

    def __call__(self, model: nn.Module, optimizer: str = "MoFaSGD", **options: Any) -> MatrixOptimizer:
        """
        Args:
            model: before it is sharded or wrapped.
            optimizer: a name of :data:`ds_mofa.optimizers.registry.OPTIMIZERS`.
            **options: what that one takes. The Trainer's own ``learning_rate`` does not reach it: give ``lr`` here.

        Raises:
            OptionError: see :class:`ds_mofa.optimizers.base.MatrixOptimizer`.
        """
        return entry_of(optimizer).optimizer(model, **options)
