"""One micro-batch of a model under fake tensors: what forward and backward keep alive, to the byte, without memory.

The model that transformers would build runs forward and backward on tensors that have shapes but no data, and
:class:`~ds_mofa.profiler.storages.StorageTracker` keeps the history. The capture of sketches runs as it is; LoRA is the
usual ``W x + scale B (A x)`` on every linear of the layers, in the model's dtype. Under FSDP2 it is ``fully_shard`` itself
that gathers and reduces, on ranks that only pretend.

The operators are the CPU's. They allocate what the CUDA ones do but for attention's row statistics and the matrix
products' workspace (some tens of MB).
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_mofa.kernels.int8 import Int8Weight
from ds_mofa.parameters import local_part
from ds_mofa.profiler.predict.simulated.model import build, one_sequence_a_row, operators
from ds_mofa.profiler.predict.simulated.optimizer import attach, put_in_eight_bits
from ds_mofa.profiler.predict.simulated.ranks import pretended_ranks
from ds_mofa.profiler.predict.simulated.trl import with_trl_loss
from ds_mofa.profiler.setting import RunSetting
from ds_mofa.profiler.sharding import shard
from ds_mofa.profiler.storages import StorageTracker, of_fsdp2

__all__ = ["MicroBatch", "Moment", "Parameter", "simulate"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter. ``kind``: "matrix" (a 2-D weight of the layers), "other", "frozen" or "adapter" (LoRA's); ``eight_bits``:
    whether it is kept so.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    kind: str
    eight_bits: bool = False


@dataclasses.dataclass(frozen=True)
class Moment:
    """Bytes alive besides parameters, gradients and states, at some moment of a micro-batch.

    Attributes:
        activations: what forward has allocated.
        workspace: what backward has allocated; the gradient that is just being computed is part of it, and one that
            waits for FSDP2 to reduce it.
        completed: number of gradients that are complete.
        communication: what FSDP2 has allocated: gathered weights, and what they and gradients travel in.
    """

    activations: int
    workspace: int
    completed: int
    communication: int = 0

    @property
    def bytes(self) -> int:
        return self.activations + self.workspace + self.communication


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward does.

    Attributes:
        parameters: of the model, in its order.
        order: names of the parameters that get a gradient, in the order in which backward completes them.
        peaks: between each two completions, the highest moment; the first is of forward and the loss.
        at_completion: the moment at which each gradient of ``order`` is complete.
        events: ("alloc", key, bytes), ("free", key, bytes) and ("complete", name, 0), in order. A key is a number, of
            what FSDP2 allocates on the stream that it gathers on ("gathered", number).
        places: :class:`ds_mofa.partition.layout.Place` of every matrix or stack of the optimizer, in its order.
        held: bytes that the optimizer's rule keeps on every rank beside its state.
    """

    parameters: list[Parameter]
    order: list[str]
    peaks: list[Moment]
    at_completion: list[Moment]
    events: list[tuple[str, Any, int]]
    places: tuple[tuple, ...] = ()
    held: int = 0

    def stretches(self) -> Iterator[tuple[Moment, tuple[str, Moment] | None]]:
        """Each of ``peaks``, with the name and the moment of the completion that ends its stretch; None for the last."""
        yield from zip(self.peaks, [*zip(self.order, self.at_completion), None])


def simulate(setting: RunSetting) -> MicroBatch:
    """Run one micro-batch, activations in bf16.

    Raises:
        PredictionError: the model cannot be built from its config, or it is not known which of its operators
            liger-kernel would replace.
    """
    with pretended_ranks(setting) as mesh, FakeTensorMode(), one_sequence_a_row():
        model = build(setting)
        if setting.weights == "int8":
            put_in_eight_bits(model, setting)
        if mesh is not None:
            shard(model, mesh, setting)
        attached = attach(model, setting)
        kinds = attached.kinds
        for param in model.parameters():  # as in every micro-batch but the first
            if param.requires_grad and kinds[param] != "sketched":
                param.grad = torch.empty_like(param)
        names = {param: name for name, param in model.named_parameters()}
        parameters = [
            Parameter(
                name,
                tuple(p.shape),
                p.numel(),
                {"sketched": "matrix"}.get(kinds[p], kinds[p]),
                isinstance(local_part(p), Int8Weight),
            )
            for p, name in names.items()
        ]
        ids = torch.zeros(setting.micro_batch, setting.seq, dtype=torch.long)
        own_loss = setting.loss == "model" and not setting.option("fused_head") and not setting.graphed
        loss = with_trl_loss(model) if setting.loss == "trl" else contextlib.nullcontext(model)
        with operators(model, setting, own_loss), loss as forward:
            order, peaks, at_completion, events = _run(model, forward, ids, kinds, names, attached.buffers)
    return MicroBatch(parameters, order, peaks, at_completion, events, attached.places, attached.held)


def _run(
    model: nn.Module,
    forward: Callable[..., Any],
    ids: Tensor,
    kinds: Mapping[nn.Parameter, str],
    names: Mapping[nn.Parameter, str],
    buffers: list[Tensor],
) -> tuple[list[str], list[Moment], list[Moment], list[tuple[str, Any, int]]]:
    counter = itertools.count(1)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    there = [*model.parameters(), *model.buffers(), *gradients, *buffers, ids]
    tracker = StorageTracker(there, clock=lambda: next(counter))
    order: list[str] = []
    ticks: list[int] = []

    def complete(param: nn.Parameter) -> None:
        order.append(names[param])
        ticks.append(next(counter))

    for param in model.parameters():
        if param.requires_grad and kinds[param] != "sketched":
            param.register_post_accumulate_grad_hook(complete)
    with tracker:
        loss = forward(input_ids=ids, labels=ids).loss
        backward_starts = next(counter)
        loss.backward()
    return order, *_moments(tracker, backward_starts, ticks), _events(tracker, order, ticks)


def _events(tracker: StorageTracker, order: list[str], ticks: list[int]) -> list[tuple[str, Any, int]]:
    timed: list[tuple[int, tuple[str, Any, int]]] = [(tick, ("complete", name, 0)) for name, tick in zip(order, ticks)]
    for number, one in enumerate(tracker.allocations):
        key = ("gathered", number) if any("foreach_all_gather" in frame for frame in one.stack) else number
        timed.append((one.born, ("alloc", key, one.size)))
        timed.append((one.died, ("free", key, one.size)))
    return [event for _, event in sorted(timed, key=lambda item: item[0])]


def _moments(tracker: StorageTracker, backward_starts: int, ticks: list[int]) -> tuple[list[Moment], list[Moment]]:
    changes = []
    for one in tracker.allocations:
        if one.born:
            kind = "communication" if of_fsdp2(one) else "activations" if one.born < backward_starts else "workspace"
            changes += [(one.born, one.size, kind), (one.died, -one.size, kind)]
    level = {"activations": 0, "workspace": 0, "communication": 0}
    peaks, at_completion = [Moment(0, 0, 0)], list[Moment]()
    for tick, size, kind in sorted(changes):
        while len(at_completion) < len(ticks) and ticks[len(at_completion)] < tick:
            done = Moment(**level, completed=len(at_completion) + 1)
            at_completion.append(done)
            peaks.append(done)
        level[kind] += size
        if sum(level.values()) > peaks[-1].bytes:
            peaks[-1] = Moment(**level, completed=len(at_completion))
    while len(at_completion) < len(ticks):
        at_completion.append(Moment(**level, completed=len(at_completion) + 1))
    return peaks, at_completion
