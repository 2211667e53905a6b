"""fp32 masters of 16-bit weights around a torch optimizer: what DeepSpeed's bf16 engine keeps of what AdamW trains."""

from typing import Any

import torch
from torch import nn

__all__ = ["keep_masters"]

Masters = dict[nn.Parameter, nn.Parameter]


def keep_masters(optimizer: torch.optim.Optimizer) -> None:
    """From now on ``optimizer`` steps fp32 copies of its 16-bit parameters, by their gradients in fp32; a parameter is
    its copy, rounded to nearest. The copies are ``optimizer.masters``, by the parameter.

    Outside of a step ``param_groups`` hold the parameters themselves, with their gradients, so whoever clips finds them.
    """
    masters: Masters = {}
    stepped: list[list[nn.Parameter]] = []

    def master(param: nn.Parameter) -> nn.Parameter:
        if param.dtype == torch.float32:
            return param
        if param not in masters:
            masters[param] = nn.Parameter(param.detach().float())
        masters[param].grad = None if param.grad is None else param.grad.float()
        return masters[param]

    def before(optimizer: torch.optim.Optimizer, *call: Any) -> None:
        for group in optimizer.param_groups:
            stepped.append(group["params"])
            group["params"] = [master(param) for param in group["params"]]

    @torch.no_grad()
    def after(optimizer: torch.optim.Optimizer, *call: Any) -> None:
        for group, params in zip(optimizer.param_groups, stepped, strict=True):
            group["params"] = params
            for param in params:
                if param in masters:
                    param.copy_(masters[param])
                    masters[param].grad = None
        stepped.clear()

    optimizer.masters = masters
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
