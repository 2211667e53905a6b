"""One engine or optimizer trains a model at a time: whose turn ends when another is built, and who is refused.

DeepSpeed lets several engines have one model. Hugging Face makes a new one for each Trainer and never calls
``destroy()``, so the hooks of an earlier engine are still there and take the gradients of a later one's parameters.
"""

import dataclasses
import functools
import json
import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ds_mofa.optimizers import registry
from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.options import OptimizerOptions, OptionError
from ds_mofa.step import claims

__all__ = [
    "check_alive",
    "check_client",
    "check_waiting",
    "checked_factory",
    "destroy",
    "enter",
    "take_over",
    "trained",
    "unhook",
]

logger = logging.getLogger("ds_mofa")

_engines: "weakref.WeakSet" = weakref.WeakSet()  # that have an optimizer, and have not been ended from here
_LOST, _TRAINED = "_ds_mofa_lost_to", "_ds_mofa_trained"


# ---------------------------------------------------------------------- one after the other


def trained(groups: Iterable[Any]) -> list[nn.Parameter]:
    """The trained parameters of what an engine was given to train: parameters, named ones, or param groups."""
    params = []
    for item in groups:
        if isinstance(item, dict):
            given = item["params"]
            params += trained([given] if isinstance(given, torch.Tensor) else given)
        else:
            params.append(item[1] if isinstance(item, tuple) else item)
    return [param for param in params if param.requires_grad]


def enter(engine, params: list[nn.Parameter]) -> None:
    """The engine has its optimizer: it trains these parameters from here on."""
    setattr(engine, _TRAINED, params)
    _engines.add(engine)


def take_over(params: Iterable[nn.Parameter], to: str, ours: bool = True) -> None:
    """End the turn of whoever trains one of ``params``; an engine is destroyed, as ``engine.destroy()`` does it.

    Args:
        to: who takes over, for the messages.
        ours: an optimizer of this package does. To any other one this package's alone give way: what two engines with
            DeepSpeed's optimizers do to each other is DeepSpeed's.
    """
    params = set(params)
    claims.release(params, to)
    for engine in list(_engines):
        mine = isinstance(engine.basic_optimizer, MatrixOptimizer)
        if (ours or mine) and not params.isdisjoint(getattr(engine, _TRAINED)):
            logger.warning(
                "ds_mofa: %s takes over the model of an engine with %s that was built before: that engine is destroyed",
                to,
                type(engine.basic_optimizer).__name__,
            )
            _engines.discard(engine)
            engine.destroy()
            unhook(engine)
            setattr(engine, _LOST, to)


def check_alive(engine) -> None:
    """Raise a LostError where another has taken over the engine's parameters."""
    to = getattr(engine, _LOST, None)
    if to is not None:
        raise claims.LostError(
            f"this engine trains nothing any more: {to} was built later over some of the same parameters, and the "
            "earlier engine was destroyed. Step the later one, or build a new engine"
        )


def destroy(original: Callable[[], None], engine) -> None:
    """``engine.destroy()``, once: what a later engine has put on the parameters is not this one's to remove."""
    if getattr(engine, _LOST, None) is None:
        _engines.discard(engine)
        original()
        if isinstance(engine.basic_optimizer, MatrixOptimizer):
            unhook(engine)


def unhook(engine) -> None:
    """Remove the hooks on the model itself, which neither ``destroy()`` nor an engine whose making fails takes away: a
    forward would run into what such an engine has not got.
    """
    for name in ("module_forward_pre_hook", "module_forward_post_hook"):
        hook = getattr(engine, name, None)
        if hook is not None:
            hook.remove()


# ---------------------------------------------------------------------- what was built outside of the engine


def check_client(engine, client: Any) -> None:
    """Refuse a client optimizer of DeepSpeed's that cannot be one.

    Args:
        client: what ``deepspeed.initialize`` got as ``optimizer``: an optimizer, or what makes one of the parameters.

    Raises:
        OptionError: an optimizer of this package, which only an engine can build for an engine; or another one although
            the config names one of this package.
    """
    if client is None:
        return
    named = registry.find(engine._config.optimizer_name)  # engine.optimizer_name() is the client's
    if named is not None:
        raise OptionError(
            f'the config says "type": "{named.name}", and deepspeed.initialize was given an optimizer '
            f"as well ({_name(client)}), which DeepSpeed would use in its place: leave one of them out"
        )
    _refuse(client)


def checked_factory(client: Any) -> Any:
    """The same client optimizer; what makes one is looked at when it has made it."""
    if isinstance(client, torch.optim.Optimizer) or not callable(client):
        return client

    @functools.wraps(client, updated=())
    def make(params):
        made = client(params)
        _refuse(made)
        return made

    return make


def check_waiting(params: Iterable[nn.Parameter], options: OptimizerOptions | None = None) -> None:
    """Refuse, once, to have an engine build something else than the plain optimizer that was built for its parameters.

    Hugging Face's Trainer drops its ``optimizers`` where there is a DeepSpeed config, and Accelerate makes a
    DeepSpeedCPUAdam of the optimizer that it is given where there is ``offload_optimizer``. All that is left of it is
    that it was built over these parameters and has never stepped.

    Args:
        options: of the optimizer of this package that the engine builds; None for another optimizer.
    """
    params = list(params)
    waiting = claims.waiting(params)
    if waiting is None or waiting == options:
        return
    claims.wait_no_more(params)
    title = waiting.title
    builds = "trains them with another optimizer" if options is None else f"builds a {options.title} of other options"
    raise OptionError(
        f"a {title} was built over this model's parameters and has not stepped, and now DeepSpeed {builds}. "
        f"{_advice(waiting)} If that {title} was for something else, do the same again: this is said once"
    )


def _refuse(client: Any) -> None:
    client = getattr(client, "func", client)  # functools.partial
    for _ in range(3):  # Accelerate's and others' wrappers
        if isinstance(client, torch.optim.Optimizer) and not isinstance(client, MatrixOptimizer):
            client = getattr(client, "optimizer", client)
    if isinstance(client, MatrixOptimizer):
        claims.wait_no_more(matrix.param for matrix in client.split.matrices)
        raise OptionError(
            f"{client.options.title} cannot be handed over to DeepSpeed as an optimizer: its sketches would not be "
            f"added up over the ranks. {_advice(client.options, groups=len(client.matrix_groups) > 1)}"
        )
    if isinstance(client, type) and issubclass(client, MatrixOptimizer):
        raise OptionError(
            f'{client.options_class.title} cannot be handed over to DeepSpeed as an optimizer: write "optimizer": '
            f'{{"type": "{client.options_class.title}", "params": {{...}}}} into the DeepSpeed config'
        )


def _advice(options: OptimizerOptions, groups: bool = False) -> str:
    return (
        f'Have the engine build it: write "optimizer": {json.dumps(_section(options))} into the DeepSpeed config, and '
        "hand no optimizer over" + (", but its param groups as model_parameters" if groups else "") + "."
    )


def _section(options: OptimizerOptions) -> dict[str, Any]:
    """What of a DeepSpeed config makes these options."""
    params = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            params[field.name] = list(value) if isinstance(value, tuple) else value
    return {"type": options.title, "params": params}


def _name(client: Any) -> str:
    return getattr(client, "__name__", type(client).__name__)
