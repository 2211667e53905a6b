"""How AdamW trains what is no matrix."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ds_mofa.options.checks import Checked, check_number, check_pair

__all__ = ["AdamWOptions", "AdamWReduce", "AdamWStates"]

AdamWReduce = Literal["step", "micro_batch"]
AdamWStates = Literal["full", "8bit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWOptions(Checked):
    """The options of everything else that is trained.

    Attributes:
        adamw_lr: learning rate; None: lr. What is left to AdamW of a param group with an ``lr`` of its own steps
            at adamw_lr * (the group's lr / lr): layer-wise rates scale both alike.
        adamw_betas: decay rates of the two moments.
        adamw_eps: added to the denominator.
        adamw_weight_decay: decoupled; None: the same as ``weight_decay``. Parameter groups that set
            ``weight_decay: 0`` themselves keep 0.
        adamw_reduce: how often ZeRO stage 2 sends the gradients of this part. Once a ``"step"``: until then every rank
            holds them whole, 2 bytes a parameter in bf16. After each ``"micro_batch"``, as DeepSpeed does it for
            AdamW: a rank holds those that its partition has a piece of, which is all of the large ones, each in a
            partition of its own; choose it if AdamW trains a large share of the model. Stages 0 and 1 always do the
            first. Stage 3 always does the second, and so does stage 2 where gradients add up on the host
            (``offload_optimizer``), in another dtype than the weights', or without DeepSpeed counting micro-batches.
        adamw_states: how the two moments are kept. ``"full"``: in the dtype that the parameter is stepped in, 8 bytes a
            parameter with fp32 masters, 4 in bf16. ``"8bit"``: in blocks of 256 8-bit codes and a scale, 2.03 bytes
            (:mod:`ds_mofa.adamw.eight_bit`; needs torchao). bf16 parameters without an fp32 master, which ``"full"`` rounds
            to nearest, are then written by ``rounding``. Tensors below 4096 elements, of a partition under ZeRO, keep
            32 bits; a line in the log says how many. Does not go with ``offload_optimizer`` and universal checkpoints,
            and replaces DeepSpeed's choice of AdamWs (``torch_adam``, ``fused``, ``foreach``).
    """

    adamw_lr: float | None = None
    adamw_betas: Sequence[float] = (0.9, 0.999)
    adamw_eps: float = 1e-8
    adamw_weight_decay: float | None = None
    adamw_reduce: AdamWReduce = "step"
    adamw_states: AdamWStates = "full"

    def __post_init__(self):
        for name in ("adamw_lr", "adamw_weight_decay"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0)
        check_pair("adamw_betas", self.adamw_betas, low=0, high=1)
        check_number("adamw_eps", self.adamw_eps, low=0, open_low=True)
        super().__post_init__()
