"""One micro-batch of a model under fake tensors: what forward and backward keep alive, to the byte, without memory.

The model that transformers would build runs forward and backward on tensors that have shapes but no data, and
:class:`~ds_mofa.profiler.trace.StorageTracker` keeps the history. MoFaSGD's capture runs as it is; LoRA is the usual
``W x + scale B (A x)`` on every linear of the layers, in the model's dtype.

The operators are the CPU's. They allocate what the CUDA ones do but for attention's row statistics and the matrix
products' workspace (some tens of MB).
"""

import contextlib
import dataclasses
import io
import itertools
import json
import re
import unittest.mock
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_mofa.optimizers.mofasgd import MoFaSGD
from ds_mofa.options import OptionError, Options
from ds_mofa.parameters import split_parameters
from ds_mofa.profiler.liger import MODELS, fused
from ds_mofa.profiler.trace import StorageTracker

__all__ = ["MicroBatch", "Moment", "Parameter", "simulate"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter. ``kind``: "matrix" (a 2-D weight of the layers), "other", "frozen" or "adapter" (LoRA's)."""

    name: str
    shape: tuple[int, ...]
    numel: int
    kind: str


@dataclasses.dataclass(frozen=True)
class Moment:
    """Bytes alive besides parameters, gradients and states, at some moment of a micro-batch.

    Attributes:
        activations: what forward has allocated.
        workspace: what backward has allocated; the gradient that is just being computed is part of it.
        completed: number of gradients that are complete.
    """

    activations: int
    workspace: int
    completed: int


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward does.

    Attributes:
        parameters: of the model, in its order.
        order: names of the parameters that get a gradient, in the order in which backward completes them.
        peaks: between each two completions, the highest moment; the first is of forward and the loss.
        at_completion: the moment at which each gradient of ``order`` is complete.
        events: ("alloc", key, bytes), ("free", key, bytes) and ("complete", name, 0), in order.
    """

    parameters: list[Parameter]
    order: list[str]
    peaks: list[Moment]
    at_completion: list[Moment]
    events: list[tuple[str, Any, int]]


class PredictionError(ValueError):
    """What was asked for cannot be predicted; the message says why, and what can."""


def simulate(
    model_config: str | Path | dict[str, Any],
    optimizer: str = "AdamW",
    *,
    tokens: int = 1024,
    micro_batch: int = 1,
    rank: int = 8,
    explore: int = 0,
    checkpointing: bool = False,
    liger: bool = False,
    fused_head: bool = False,
    head: str = "adamw",
    embed: str = "trained",
    dtype: torch.dtype = torch.bfloat16,
) -> MicroBatch:
    """Run one micro-batch.

    Args:
        model_config: path of a JSON with a model's shape (configs/models), or its content.
        optimizer: "MoFaSGD" captures sketches in the place of gradients, "LoRA" freezes the model and adds
            adapters; any other name computes every gradient.
        tokens: of one sequence.
        micro_batch: sequences.
        rank: of MoFaSGD and LoRA.
        explore: of MoFaSGD.
        checkpointing: recompute each layer in backward.
        liger: with liger-kernel's fused operators (:mod:`ds_mofa.profiler.liger`).
        fused_head: with MoFaSGD's option of that name, in the place of liger-kernel's loss.
        head: "matrix" makes the output head one of MoFaSGD's.
        embed: "frozen" leaves the embedding as it is.
        dtype: of weights and activations.

    Raises:
        PredictionError: the model cannot be built from its config, transformers is missing, or it is not known which of
            the model's operators liger-kernel would replace.
    """
    with FakeTensorMode(), _one_sequence_a_row():
        model = _build(model_config, dtype)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if embed == "frozen":
            model.get_input_embeddings().weight.requires_grad_(False)
        include = _head_names(model) if head == "matrix" else []
        options = {"explore": explore, "fused_head": fused_head, "include": include}
        kinds, states, _kept = _prepare(model, optimizer, rank, options)
        for param in model.parameters():  # as in every micro-batch but the first
            if param.requires_grad and kinds[param] != "sketched":
                param.grad = torch.empty_like(param)
        names = {param: name for name, param in model.named_parameters()}
        parameters = [
            Parameter(name, tuple(p.shape), p.numel(), {"sketched": "matrix"}.get(kinds[p], kinds[p]))
            for p, name in names.items()
        ]
        ids = torch.zeros(micro_batch, tokens, dtype=torch.long)
        with _operators(model, liger, not fused_head):
            order, peaks, at_completion, events = _run(model, ids, kinds, names, states)
    return MicroBatch(parameters, order, peaks, at_completion, events)


def _build(model_config: str | Path | dict[str, Any], dtype: torch.dtype) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise PredictionError(
            f"a prediction builds the model with transformers ({error}): pip install 'ds_mofa[train]'"
        )
    shape = model_config
    if not isinstance(shape, dict):
        try:
            shape = json.loads(Path(model_config).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise PredictionError(f"{model_config}: no model shape could be read ({error}). Give one of configs/models")
    if "model_type" not in shape:
        raise PredictionError(
            f'{model_config}: no "model_type", so the architecture is unknown. Add it, such as "llama"'
        )
    config = AutoConfig.for_model(**shape)
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()


def _head_names(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings().weight
    return [f"^{re.escape(name)}$" for name, param in model.named_parameters() if param is head]


def _prepare(
    model: nn.Module, optimizer: str, rank: int, options: dict[str, Any]
) -> tuple[dict[Tensor, str], list[Tensor], MoFaSGD | None]:
    """Attach what the optimizer attaches.

    Returns:
        The kind of each parameter, "sketched" for MoFaSGD's matrices; the tensors of the optimizer that backward writes
        into, which no micro-batch allocates; and the optimizer, which is attached for as long as it is kept.
    """
    split = split_parameters(model, model.parameters(), Options(lr=1.0, rank=1))
    matrices = {matrix.param for matrix in split.matrices}
    if optimizer == "MoFaSGD":
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                # It notes addresses, which fake tensors lack, and does not use them here.
                warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
                trained = MoFaSGD(model, lr=1.0, rank=rank, **options)
        except OptionError as error:
            raise PredictionError(str(error)) from error
        matrices = {matrix.param for matrix in trained.split.matrices}
        own = [trained.matrices.sketches, trained.matrices.working, trained.matrices.factors]
        return {p: "sketched" if p in matrices else _other(p) for p in model.parameters()}, own, trained
    if optimizer != "LoRA":
        return {p: "matrix" if p in matrices else _other(p) for p in model.parameters()}, [], None
    frozen = set(model.parameters())
    for p in frozen:
        p.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.weight in matrices:
                setattr(parent, name, _LoRALinear(child, rank))
    return {p: "frozen" if p in frozen else "adapter" for p in model.parameters()}, [], None


def _other(param: nn.Parameter) -> str:
    return "other" if param.requires_grad else "frozen"


class _LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        options = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.A, self.B = nn.Linear(base.in_features, rank, **options), nn.Linear(rank, base.out_features, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(x)) * 2.0


def _operators(model: nn.Module, liger: bool, loss: bool) -> contextlib.AbstractContextManager:
    """Within: the model computes with liger-kernel's operators, with ``loss`` that of the loss too, or with its own."""
    if not liger:
        return contextlib.nullcontext()
    if model.config.model_type not in MODELS:
        raise PredictionError(
            f'liger-kernel with a model of type "{model.config.model_type}" cannot be predicted: which of its operators '
            f"are replaced is known of {', '.join(MODELS)}. Predict it without liger"
        )
    return fused(model, loss)


@contextlib.contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """Within: transformers takes each row for one sequence, as it finds real rows to be.

    It looks into the position ids for packed sequences. Fake ones have no values to look into, and it would then build
    a mask, expand keys and values to all heads, and save those.
    """
    try:
        with unittest.mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None):
            yield
    except (ModuleNotFoundError, AttributeError) as error:
        if "find_packed_sequence_indices" not in str(error) and "masking_utils" not in str(error):
            raise
        raise PredictionError(f"this version of transformers looks for packed sequences elsewhere ({error})") from error


def _run(model, ids, kinds, names, states) -> tuple[list[str], list[Moment], list[Moment], list[tuple[str, Any, int]]]:
    counter = itertools.count(1)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    there = [*model.parameters(), *model.buffers(), *gradients, *states, ids]
    tracker = StorageTracker(there, clock=lambda: next(counter))
    order: list[str] = []
    ticks: list[int] = []

    def complete(param: Tensor) -> None:
        order.append(names[param])
        ticks.append(next(counter))

    for param in model.parameters():
        if param.requires_grad and kinds[param] != "sketched":
            param.register_post_accumulate_grad_hook(complete)
    with tracker:
        loss = model(input_ids=ids, labels=ids).loss
        backward_starts = next(counter)
        loss.backward()
    return order, *_moments(tracker, backward_starts, ticks), _events(tracker, order, ticks)


def _events(tracker: StorageTracker, order: list[str], ticks: list[int]) -> list[tuple[str, Any, int]]:
    timed = [(tick, ("complete", name, 0)) for name, tick in zip(order, ticks)]
    for key, one in enumerate(tracker.allocations):
        timed.append((one.born, ("alloc", key, one.size)))
        timed.append((one.died, ("free", key, one.size)))
    return [event for _, event in sorted(timed, key=lambda item: item[0])]


def _moments(tracker: StorageTracker, backward_starts: int, ticks: list[int]) -> tuple[list[Moment], list[Moment]]:
    changes = sorted(
        change
        for one in tracker.allocations
        if one.born
        for change in (
            (one.born, one.size, one.born < backward_starts),
            (one.died, -one.size, one.born < backward_starts),
        )
    )
    activations = workspace = 0
    peaks, at_completion = [Moment(0, 0, 0)], []
    for tick, size, forward in changes:
        while len(at_completion) < len(ticks) and ticks[len(at_completion)] < tick:
            done = Moment(activations, workspace, len(at_completion) + 1)
            at_completion.append(done)
            peaks.append(done)
        if forward:
            activations += size
        else:
            workspace += size
        if activations + workspace > peaks[-1].activations + peaks[-1].workspace:
            peaks[-1] = Moment(activations, workspace, len(at_completion))
    while len(at_completion) < len(ticks):
        at_completion.append(Moment(activations, workspace, len(at_completion) + 1))
    return peaks, at_completion
