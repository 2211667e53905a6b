"""What the scenes of a plain loop share: an optimizer of one's own over a model that is sharded, wrapped, or neither."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from comparing import STEPS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toys import Layers, including, micro_batches, plenty
from training import GALORE, OPTIONS, TIGHT, mean_over_ranks, toy

from ds_mofa import GaLore, MoFaSGD
from ds_mofa.kernels import int8
from experiments.baselines.orientation import like

__all__ = [
    "SETTINGS",
    "alone",
    "built",
    "clipping",
    "galore",
    "layers",
    "line",
    "mofasgd",
    "number",
    "shard",
    "square",
    "step_on",
    "train",
    "whole",
]

SETTINGS = {key: value for key, value in OPTIONS.items() if key != "torch_adam"}  # which is DeepSpeed's


def layers() -> Layers:
    return toy(Layers)


def mofasgd(model: nn.Module, **options: Any) -> MoFaSGD:
    return MoFaSGD(model, **{**SETTINGS, **options, **including(model, options.get("include", ()))})


def galore(model: nn.Module, **options: Any) -> GaLore:
    settings = {key: value for key, value in GALORE.items() if key != "torch_adam"}
    return GaLore(model, **{**settings, **options, **including(model, options.get("include", ()))})


@functools.cache
def line() -> DeviceMesh:
    """All ranks, one after the other."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


@functools.cache
def alone() -> dist.ProcessGroup:
    """This rank."""
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


@functools.cache
def square() -> DeviceMesh:
    """Four ranks: two replicas of two shards each."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))


def shard(model: Layers, cut: str = "blocks", mesh: DeviceMesh | None = None, **switches: Any) -> Layers:
    """Call ``fully_shard``.

    Args:
        cut: "blocks", "whole", or "each", where each linear is a root of its own and those of one matrix are one.
    """
    mesh = line() if mesh is None else mesh
    if cut == "each":
        feed, pair = model.feed, model.pair
        units = [model.place, feed.up, feed.down, [pair.twin, pair.echo], model.gate]
    else:
        units = [model.mix, model.feed, model.pair] if cut == "blocks" else []
    for unit in units:
        fully_shard(unit, mesh=mesh, **switches)
    return fully_shard(model, mesh=mesh, **switches)


def built(cut: str = "blocks", mesh: DeviceMesh | None = None, options: dict | None = None, **switches: Any):
    """A sharded model and its optimizer."""
    model = shard(layers(), cut, mesh, **switches)
    return model, mofasgd(model, **(options or {}))


def step_on(
    model: nn.Module,
    optimizer: MoFaSGD,
    batch,
    *,
    micro: int = 1,
    clip: Callable[[], Any] | None = None,
    sync: Callable[[bool], Any] | None = None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    zero: Callable[[], Any] | None = None,
    move: Callable[[], Any] | None = None,
) -> tuple[float, list[float]]:
    """Train on a global batch: its mean loss before the step, and what ``clip`` has returned.

    Args:
        clip: called after the last backward.
        sync: called before each, with whether it is the last.
        backward: takes a micro-batch's part of the loss.
        zero, move: in the place of the optimizer's ``zero_grad`` and ``step``.
    """
    (zero or optimizer.zero_grad)()
    total, norms = torch.zeros(()), []
    for i, part in enumerate(micro_batches(batch, dist.get_rank(), dist.get_world_size(), micro)):
        if sync is not None:
            sync(i == micro - 1)
        loss = model(*part) / micro
        backward(loss)
        total += loss.detach().float()
    if clip is not None:
        found = clip()
        norms = [number(norm) for norm in (found if isinstance(found, tuple) else [found])]
    (move or optimizer.step)()
    return mean_over_ranks(total), norms


def number(norm: Tensor) -> float:
    """Of a norm that torch has computed."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def train(
    model: nn.Module, optimizer: MoFaSGD, steps: int = STEPS, *, data=plenty, before=lambda step: None, **how: Any
) -> dict[str, Any]:
    """Train on ``steps`` batches and evaluate one more.

    Args:
        data: makes the batches.
        before: called with the number of each step, from 1.
        **how: as for :func:`step_on`.

    Returns:
        The losses, one more than steps; of each step the norm that ``clip`` has returned, or a list of several; at the end
        the weights, the momenta (on rank 0 at least) and the broadcast factors.
    """
    *batches, last = data(steps + 1)
    results = []
    for step, batch in enumerate(batches, 1):
        before(step)
        results.append(step_on(model, optimizer, batch, **how))
    weights = whole(model)  # before a forward without a backward, which leaves a root gathered
    with torch.no_grad():
        (part,) = micro_batches(last, dist.get_rank(), dist.get_world_size(), 1)
        loss = mean_over_ranks(model(*part).float())
    return {
        "losses": [*(loss for loss, _ in results), loss],
        "norms": [norms[0] if len(norms) == 1 else norms for _, norms in results],
        "weights": weights,
        "momenta": momenta(optimizer),
        "working": optimizer.matrices.working.clone(),
    }


def clipping(model: nn.Module, foreach: bool | None = None) -> Callable[[], Tensor]:
    """torch's own, by the norm of all parameters."""
    return lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), TIGHT, foreach=foreach)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, gathered where it is sharded, by its name in the model that nothing has wrapped."""
    params = {bare(name): param for name, param in model.named_parameters()}
    return {
        name: int8.whole((param.full_tensor() if isinstance(param, DTensor) else param).detach()).clone()
        for name, param in params.items()
    }


def bare(name: str) -> str:
    """A parameter's name without those of wrappers."""
    for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(wrapper, "")
    return name


def momenta(optimizer: MoFaSGD | GaLore) -> dict[str, Tensor]:
    """The momentum of every matrix, whole, on the first rank at least. Collective."""
    state = optimizer.matrices.state_dict().get("matrices", {})
    if isinstance(optimizer, GaLore):
        shapes = {matrix.name: matrix.shape for matrix in optimizer.matrices.members}
        return {bare(name): like(one["P"] @ one["m"].mT, shapes[name]) for name, one in state.items()}
    return {bare(name): one["U"] * one["sigma"].unsqueeze(-2) @ one["V"].mT for name, one in state.items()}
