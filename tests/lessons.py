"""What a tiny model of :mod:`tests.architectures` must show: it learns its batch by heart, and every weight takes part."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_mofa import MoFaSGD, split_model
from ds_mofa.options import Options
from ds_mofa.parameters import Split, split_parameters
from tests.architectures import INCLUDED, RANK, Architecture, Batch, batch_of, build

__all__ = [
    "ENGINES",
    "OPTIONS",
    "STEPS",
    "Lesson",
    "RealShares",
    "everything",
    "gradients",
    "lesson",
    "made",
    "options_of",
    "part_of",
    "real_shares",
    "shares",
    "still",
    "verdict",
]

ENGINES = (("one", "one process"), ("zero2", "ZeRO-2"), ("zero3", "ZeRO-3"), ("fsdp2", "FSDP2"))
STEPS = 8
# AdamW's rate is so low that what the loss falls by is the matrices' work.
OPTIONS: dict[str, Any] = {"lr": 4e-3, "rank": RANK, "adamw_lr": 1e-7, "adjust_lr_fn": "adamw"}
_LEARNED = 0.9999  # of the first loss: below it is the last, where a model has learned
_EXACT = 1e-5  # relative error of a sketch
_AGREES = 1e-4  # relative, of two losses that are one but for rounding
_REAL_RANK = 8
_LONGEST = 90  # letters of an error's first line in a cell
_NOISE = 1e-7  # a gradient below it may be rounding alone


class Lesson(NamedTuple):
    """What training on one batch has shown.

    Attributes:
        losses: before each step, and after the last.
        still: names of the weights of two dimensions and more that had a gradient and have not moved; of a stack of
            matrices any slice.
        error: the largest relative error of a sketch, of one matrix or slice, in the first backward; None if not asked.
    """

    losses: list[float]
    still: list[str]
    error: float | None = None


def options_of(one: Architecture) -> dict[str, Any]:
    """What its optimizer is told: experts of a class that nobody knows are named."""
    return {**OPTIONS, **({"include": [INCLUDED[one.cls]]} if one.cls in INCLUDED else {})}


def made(one: Architecture) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = build(one)
    return model, batch_of(one, model)


def part_of(batch: Batch, rank: int, world: int) -> Batch:
    """What one process has of a batch. What has no rows is everybody's."""
    return {key: value.chunk(world)[rank].clone() if value.ndim else value for key, value in batch.items()}


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Those that autograd computes on a copy of the model, by name; of what has none, nothing."""
    plain = copy.deepcopy(model)
    plain(**part_of(batch, 0, 1)).loss.backward()
    return {name: param.grad for name, param in plain.named_parameters() if param.grad is not None}


def still(before: Mapping[str, Tensor], after: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights that had a gradient in the first step and are as before; see :class:`Lesson`."""
    found = []
    for name, grad in grads.items():
        if grad.ndim < 2 or not grad.numel():  # MobileBERT has a head without columns
            continue
        slices = (lambda one: one) if grad.ndim > 2 else (lambda one: one[None])
        trained = slices(grad).flatten(1).abs().amax(1) > _NOISE
        moved = (slices(before[name]) != slices(after[name])).flatten(1).any(1)
        if (trained & ~moved).any():
            found.append(name)
    return found


def lesson(one: Architecture, **options: Any) -> Lesson:
    """Train it in one process."""
    model, batch = made(one)
    before, grads = {name: p.detach().clone() for name, p in model.named_parameters()}, gradients(model, batch)
    optimizer = MoFaSGD(model, **{**options_of(one), **options})
    losses, error = [], None
    for _ in range(STEPS):
        loss = model(**part_of(batch, 0, 1)).loss
        loss.backward()
        if error is None:
            error = _worst(optimizer, grads)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        losses.append(float(model(**part_of(batch, 0, 1)).loss))
    return Lesson(losses, still(before, dict(model.named_parameters()), grads), error)


def verdict(
    alone: Lesson,
    losses: Sequence[float] | None = None,
    still: Sequence[str] | None = None,
    error: str | None = None,
) -> str:
    """A cell of the table: "yes", or what is wrong.

    Args:
        alone: what one process has shown.
        losses, still, error: what an engine has, if it is asked for one.
    """
    if error is not None:
        return f"no: `{error.splitlines()[0][:_LONGEST]}`"
    losses, still = alone.losses if losses is None else losses, alone.still if still is None else still
    if alone.error is not None and not alone.error < _EXACT:
        return f"no: a sketch is off by {alone.error:.0e}"
    if still:
        return f"no: {still[0]} does not move"
    if not losses[-1] < _LEARNED * losses[0]:
        return "no: the loss does not fall"
    if any(abs(x - y) > _AGREES * abs(y) for x, y in zip(losses, alone.losses, strict=True)):
        return "no: other losses than in one process"
    return "yes"


def _worst(optimizer: MoFaSGD, grads: Mapping[str, Tensor]) -> float:
    worst = 0.0
    for matrix, sketch in zip(optimizer.split.matrices, optimizer.matrices.captured, strict=True):
        G = grads.get(matrix.name, torch.zeros_like(matrix.param)).double()
        for sketched, expected in ((sketch.Y, G @ sketch.V.double()), (sketch.Z, G.mT @ sketch.U.double())):
            far, size = ((sketched.double() - expected).norm(dim=(-2, -1)), expected.norm(dim=(-2, -1)))
            worst = max(worst, float((far / size.clamp(min=1e-12)).max()))
    return worst


def everything(one: Architecture) -> list[str]:
    """Patterns that make matrices of its embeddings and heads, and of experts of a class that nobody knows."""
    with torch.device("meta"):
        model = build(one)
    return _patterns(one, model, _split(model))


def shares(one: Architecture) -> tuple[float, float]:
    """Of the trained parameters, what part are matrices: by default, and with :func:`everything` included."""
    with torch.device("meta"):
        model = build(one)
    plain = _split(model)
    return plain.share, _split(model, _patterns(one, model, plain)).share


def _patterns(one: Architecture, model: nn.Module, split: Split) -> list[str]:
    named = [rest.name for rest in split.leftovers if rest.reason in ("embedding", "output head")]
    fitting = [name for name in named if min(model.get_parameter(name).shape) >= RANK]
    return [f"^{re.escape(name)}$" for name in fitting] + options_of(one).get("include", [])


class RealShares(NamedTuple):
    """Of a model of published size: its parameters, both shares, and the largest of what stays AdamW's with both."""

    parameters: int
    default: float
    included: float
    rest: str


def real_shares(config: str) -> RealShares:
    """The shares that ``python -m ds_mofa split CONFIG`` has, by default and with the embedding and the head included."""
    model = split_model.build(config, torch.bfloat16)
    plain = split_model.described(model, {"rank": _REAL_RANK})
    named = [rest["name"] for rest in plain["largest_on_adamw"] if rest["reason"] in ("embedding", "output head")]
    patterns = [f"^{re.escape(name)}$".replace(r"\*", "[0-9]+") for name in named]
    more = split_model.described(model, {"rank": _REAL_RANK, "include": patterns})
    rest = more["largest_on_adamw"][0]
    return RealShares(plain["parameters"], plain["share"], more["share"], f"{rest['name']} ({rest['reason']})")


def _split(model: nn.Module, include: Sequence[str] = ()) -> Split:
    return split_parameters(model, model.parameters(), Options(rank=RANK, include=include))
