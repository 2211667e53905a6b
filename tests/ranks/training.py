"""What the scenes share: an engine for the toy model, a step on a global batch, and the whole of every weight."""

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor, nn
from toys import Toy, batches, including, micro_batches

from ds_mofa.kernels.int8 import whole
from ds_mofa.optimizers.registry import find
from experiments.baselines.orientation import like

__all__ = [
    "GALORE",
    "OPTIONS",
    "TIGHT",
    "config",
    "engine_for",
    "evaluate",
    "matrices_of",
    "mean_over_ranks",
    "toy",
    "train",
    "train_step",
    "whole_momenta",
    "whole_weights",
    "with_the_toy_s_own",
]

OPTIONS: dict[str, Any] = {"lr": 2e-3, "rank": 4, "weight_decay": 0.1, "adamw_eps": 1e-6, "torch_adam": True}


# With eps far above rounding: Adam's first direction is the sign of a gradient, of which rounding may decide.
GALORE: dict[str, Any] = {**OPTIONS, "lr": 1e-2, "refresh_every": 3, "alpha": 0.5, "eps": 1e-3, "adamw_lr": 1e-3}

TIGHT = 0.2  # to clip by: the norm of every step of the toy is far above it


def config(
    stage: int,
    *,
    dtype: str = "fp32",
    micro: int = 1,
    options: dict | None = None,
    optimizer: str = "MoFaSGD",
    **rest,
) -> dict[str, Any]:
    """A DeepSpeed config; ``options`` and ``rest`` are merged into it."""
    defaults = {"MoFaSGD": OPTIONS, "GaLore": GALORE}[optimizer]
    zero = {"stage": stage, **rest.pop("zero_optimization", {})}
    if stage == 3:
        zero.setdefault("stage3_param_persistence_threshold", 40)  # norms and biases persist, matrices do not
    precision = {} if dtype == "fp32" else {dtype: {"enabled": True, **rest.pop(dtype, {})}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro,
        "optimizer": {"type": optimizer, "params": {**defaults, **(options or {})}},
        "zero_optimization": zero,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0
        **precision,
        **rest,
    }


def toy(model: type[nn.Module] = Toy, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return model(**kwargs)


@contextlib.contextmanager
def engine_for(settings: dict[str, Any], model: nn.Module | None = None, groups=None, **kwargs) -> Iterator[Any]:
    """A DeepSpeed engine, destroyed at the end."""
    model = toy() if model is None else model
    settings = with_the_toy_s_own(settings, model)
    groups = [p for p in model.parameters() if p.requires_grad] if groups is None else groups
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=settings, **kwargs)
    try:
        yield engine
    finally:
        engine.destroy()


def with_the_toy_s_own(settings: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The settings, with the model's bare matrix among ``include`` where the optimizer has matrices."""
    section = settings.get("optimizer")
    if section is None or find(section["type"]) is None:
        return settings
    params = section["params"]
    params = {**params, **including(model, params.get("include", ()))}
    return {**settings, "optimizer": {**section, "params": params}}


def train_step(engine, batch) -> float:
    """Train on a global batch; its mean loss before the step."""
    count = engine.gradient_accumulation_steps()
    total = torch.zeros(())
    for part in micro_batches(batch, dist.get_rank(), dist.get_world_size(), count):
        loss = engine(*part)
        engine.backward(loss)
        engine.step()
        total += loss.detach().float() / count
    return mean_over_ranks(total)


def mean_over_ranks(value: Tensor) -> float:
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def train(
    settings: dict[str, Any], steps: int, *, look=lambda engine: None, data=None, step=None, **kwargs
) -> dict[str, Any]:
    """Train on ``steps`` batches and evaluate one more.

    Args:
        look: called with the engine at the end.
        data: in the place of ``batches(steps + 1)``.
        step: in the place of ``train_step``.

    Returns:
        The losses, one more than steps; each step's gradient norm and each group's lr in it; at the end the
        weights, the momenta (on rank 0) and what ``look`` sees.
    """
    with engine_for(settings, **kwargs) as engine:
        *data, last = batches(steps + 1) if data is None else data
        losses, norms, rates = [], [], []
        for batch in data:
            rates.append([group["lr"] for group in engine.optimizer.param_groups])
            losses.append((step or train_step)(engine, batch))
            norms.append(float(engine.get_global_grad_norm()))
        weights, momenta = whole_weights(engine.module), whole_momenta(engine)
        losses.append(evaluate(engine, last))
        result = {"losses": losses, "weights": weights, "momenta": momenta, "norms": norms, "lr": rates}
        return {**result, "seen": look(engine)}


@torch.no_grad()
def evaluate(engine, batch) -> float:
    (part,) = micro_batches(batch, dist.get_rank(), dist.get_world_size(), 1)
    return mean_over_ranks(engine(*part).float())


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, gathered where it is partitioned, in the dtype that it is trained in."""
    weights = {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            weights[name] = whole(param.detach()).cpu().clone()
    return weights


def whole_momenta(engine) -> dict[str, Tensor]:
    """The first moment of every matrix, whole, on rank 0; empty elsewhere. Collective."""
    matrices = engine.basic_optimizer.matrices
    state = matrices.state_dict().get("matrices", {})
    if "sigma" in matrices.rule.field_names():
        return {name: one["U"] * one["sigma"].unsqueeze(-2) @ one["V"].mT for name, one in state.items()}
    if "m" not in matrices.rule.field_names():
        return {}  # a rule without one
    shapes = {matrix.name: matrix.shape for matrix in matrices.members}
    return {name: like(one["P"] @ one["m"].mT, shapes[name]) for name, one in state.items()}


def matrices_of(engine) -> dict[str, Any]:
    """The weights, momenta and working copies of the matrices, and their steps. Collective."""
    step = engine.basic_optimizer.matrices
    weights = {name: value for name, value in whole_weights(engine.module).items() if name in Toy.MATRICES}
    return {"weights": weights, "momenta": whole_momenta(engine), "working": step.working.clone(), "steps": step.steps}
