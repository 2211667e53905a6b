"""torchtitan: a container of MoFaSGD, one optimizer for each part of the model.

    trainer_config.optimizer = MoFaSGDContainer.Config(options={"lr": 1e-4, "rank": 32})

Its models replace the forward of a linear where they shard it, which ``capture="auto"`` refuses: ``capture: "hook"`` is the
default here, by which whole gradients are formed and reduced, and only the state is small.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torchtitan.components.optimizer import OptimizersContainer

from ds_mofa.optimizers.registry import entry_of

__all__ = ["MoFaSGDContainer"]

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class MoFaSGDContainer(OptimizersContainer):
    """torchtitan's container; its state is flat and by names, so torchtitan's checkpoints load on any number of ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """``options``: those of the optimizer; ``optimizer``: a name of the registry. ``param_groups`` is not read."""

        optimizer: str = "MoFaSGD"
        options: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config, *, model_parts: list[nn.Module]):
        kind = entry_of(config.optimizer).optimizer
        self.model_parts = model_parts
        self.optimizers = [kind(part, **{"capture": "hook", **config.options}) for part in model_parts]
        self._post_init([param for part in model_parts for param in part.parameters() if param.requires_grad])

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for part, optimizer in zip(self.model_parts, self.optimizers, strict=True):
            state |= get_optimizer_state_dict(part, optimizer, options=_FLAT)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizer in zip(self.model_parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, state_dict, options=_FLAT)
