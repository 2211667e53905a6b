"""Weights of eight bits in an engine: it never sees them while it casts and moves a model, and saves them as ordinary ones."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ds_mofa.backends.deepspeed.backend import EngineBackend
from ds_mofa.kernels.int8 import Int8Weight
from ds_mofa.weights.int8 import swap

__all__ = ["fragment", "set_aside"]


@contextlib.contextmanager
def set_aside(engine, model: nn.Module) -> Iterator[None]:
    """Within: the engine casts, moves and broadcasts whatever of the model is not in eight bits; the rest follows then.

    A parameter is to stay the object that it is, and ``Module.to`` cannot do that where DeepSpeed has weak references.
    """
    holders = [
        (module, dict(module._parameters))
        for module in model.modules()
        if any(isinstance(param, Int8Weight) for param in module._parameters.values())
    ]
    params: dict[nn.Parameter, None] = {}  # each once, in their order
    for module, before in holders:
        for name, param in before.items():
            if isinstance(param, Int8Weight):
                del module._parameters[name]
                params[param] = None
    try:
        yield
    finally:
        for module, before in holders:
            after = dict(module._parameters)
            module._parameters.clear()
            module._parameters.update({name: after.get(name, param) for name, param in before.items()})
    if not params:
        return
    backend = EngineBackend(engine)
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else None
    for param in params:
        swap(param, param.detach().to(backend.device, dtype))
        assert isinstance(param, Int8Weight)  # as before
        for part in (param.codes, param.exponents):
            backend.exchange.broadcast(part, 0)


def fragment(saved: Tensor) -> Tensor:
    """What a checkpoint has of a weight."""
    return saved.widened() if isinstance(saved, Int8Weight) else saved
