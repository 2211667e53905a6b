"""What FSDP2 holds of a model: shards, gathered weights, gradients that it has not reduced.

A module of FSDP2 shows its gathered weights as parameters between gathering and letting go, and its shards else, so
``model.parameters()`` is one or the other; torch has no public way to both (2.11 to 2.13).
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["held_by_fsdp2", "parameters"]


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Of ``model``, those that FSDP2 has cut as shards, whatever is gathered now."""
    cut = [param for group in _groups(model) for param in group.fsdp_params]
    gathered = {id(one._unsharded_param) for one in cut if hasattr(one, "_unsharded_param")}
    yield from (one.sharded_param for one in cut)
    shards = {id(one.sharded_param) for one in cut}
    yield from (param for param in model.parameters() if id(param) not in gathered | shards)


def held_by_fsdp2(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(category, tensors in whatever nesting) of the short-lived: gathered weights, and gradients before they are reduced.

    The buffers in which gradients are reduced are not among them: a gradient that is being reduced is none the less
    there, and what proves that no full-rank gradient lives has to see it.
    """
    for group in _groups(model):
        kept = getattr(group.comm_ctx, "all_gather_state", None)  # the context is filled by the first forward
        results = [group._all_gather_result, kept.all_gather_result if kept is not None else None]
        yield "communication buffers", [one.all_gather_output for one in results if one is not None]
        for param in group.fsdp_params:
            yield "communication buffers", param.all_gather_outputs
            yield "gradients", param.unsharded_accumulated_grad
            if hasattr(param, "_unsharded_param"):
                yield "gradients", param._unsharded_param.grad


def _groups(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            many = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 has one at most
            yield from many if many is not None else filter(None, [state._fsdp_param_group])
