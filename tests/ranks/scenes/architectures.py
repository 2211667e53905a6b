"""Tiny models of Transformers' architectures on real ranks: under ZeRO, and under FSDP2 cut by the blocks that they name."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from engines import line, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from training import config, engine_for, mean_over_ranks, whole_weights

from ds_mofa import MoFaSGD
from tests.architectures import ARCHITECTURES, LEAVES, Batch
from tests.lessons import STEPS, gradients, made, options_of, part_of, still

__all__ = ["on_engine"]

NO_DECAY = {"weight_decay": 0.0, "adamw_eps": 1e-8}


def on_engine(name: str, engine: str) -> dict[str, Any]:
    """Train an architecture under "zero2", "zero3" or "fsdp2", on as many ranks as there are.

    Returns:
        losses (means over ranks) and names as :class:`tests.lessons.Lesson` has them; or the error that all ranks end with.
    """
    try:
        return _trained(name, engine)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _trained(name: str, engine: str) -> dict[str, Any]:
    model, batch = made(ARCHITECTURES[name])
    options = options_of(ARCHITECTURES[name])
    before, grads = {key: p.detach().clone() for key, p in model.named_parameters()}, gradients(model, batch)
    mine = part_of(batch, dist.get_rank(), dist.get_world_size())
    losses, after = (_by_fsdp2 if engine == "fsdp2" else _by_zero)(model, mine, options, engine)
    return {"losses": losses, "still": still(before, after, grads)}


def _by_zero(
    model: nn.Module, mine: Batch, options: dict[str, Any], engine: str
) -> tuple[list[float], Mapping[str, Tensor]]:
    settings = config(int(engine[-1]), options={**options, **NO_DECAY})
    if engine == "zero3" and type(model).__name__ in LEAVES:
        settings["zero_optimization"]["leaf_module"] = {"classes": [LEAVES[type(model).__name__]]}
    with engine_for(settings, model) as built:

        def step() -> float:
            loss = built(**mine).loss
            built.backward(loss)
            built.step()
            return mean_over_ranks(loss.detach().float())

        return _steps(step, lambda: built(**mine).loss), whole_weights(built.module)


def _by_fsdp2(
    model: nn.Module, mine: Batch, options: dict[str, Any], engine: str
) -> tuple[list[float], Mapping[str, Tensor]]:
    for block in _blocks(model):
        fully_shard(block, mesh=line())
    optimizer = MoFaSGD(model, **options)

    def step() -> float:
        loss = model(**mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return mean_over_ranks(loss.detach().float())

    losses = _steps(step, lambda: model(**mine).loss)
    return losses, whole(model)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What is cut on its own, the inner first and the model last: the classes that it names, but for tied weights' modules."""
    places = Counter(param for _, param in model.named_parameters(remove_duplicate=False))
    found = [model]
    for module in model.modules():
        inside = Counter(param for _, param in module.named_parameters(remove_duplicate=False))
        if type(module).__name__ in (model._no_split_modules or ()) and all(places[p] == n for p, n in inside.items()):
            found.append(module)
    return list(dict.fromkeys(reversed(found)))


def _steps(step: Callable[[], float], evaluate: Callable[[], Tensor]) -> list[float]:
    losses = [step() for _ in range(STEPS)]
    with torch.no_grad():
        return [*losses, mean_over_ranks(evaluate().float())]
