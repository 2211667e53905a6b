"""Axolotl: ``plugins: [ds_mofa.integrations.axolotl.Plugin]`` in the YAML.

Under DeepSpeed that is all; the JSON names the optimizer. Under FSDP2, DDP or in one process the YAML has the options:

    mofasgd: {lr: 1e-4, rank: 32}
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import nn

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.for_trainer import ForTrainer
from ds_mofa.options import OptionError

__all__ = ["Arguments", "Plugin"]


class Arguments(BaseModel):
    """What the plugin adds to Axolotl's YAML.

    Attributes:
        mofasgd: options of :class:`ds_mofa.MoFaSGD`; ``optimizer: GaLore`` among them takes that one.
    """

    mofasgd: dict[str, Any] | None = None


class _Factory:
    """As :class:`ds_mofa.ForTrainer`; Axolotl hands its trainer's arguments over too, after the model."""

    def __call__(self, model: nn.Module, _arguments: Any = None, /, **options: Any) -> MatrixOptimizer:
        return ForTrainer()(model, **options)


class Plugin(BasePlugin):
    """Importing it makes MoFaSGD known to DeepSpeed; see the module for the rest."""

    def get_input_args(self) -> str:
        return f"{__name__}.{Arguments.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Have the trainer build the optimizer, where the YAML has options for it.

        Raises:
            OptionError: a DeepSpeed JSON is given as well, which names the optimizer.
        """
        options = cfg.get("mofasgd")
        if options is None:
            return
        if cfg.get("deepspeed"):
            raise OptionError(
                '"mofasgd" in the YAML: under DeepSpeed write it into the JSON, "optimizer": {"type": "MoFaSGD"}'
            )
        trainer.optimizer_cls_and_kwargs = (_Factory, {name: _number(value) for name, value in options.items()})


def _number(value: Any) -> Any:
    """6e-3 without a dot is a string to the YAML reader that Axolotl has."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
