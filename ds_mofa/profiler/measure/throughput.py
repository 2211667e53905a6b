"""Tokens, seconds and joules of the steps of one rank."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_mofa.profiler.measure.flops import flops_per_token, peak_flops

__all__ = ["Throughput"]


class Throughput:
    """What the steps of one rank came to; those that are not counted, as the recorded one, leave no trace.

    Args:
        joules: gives what the device has used up so far; None where nobody counts it.

    Attributes:
        shape: (sequences, tokens) of the largest forward so far; None before one.
        loss: "trl" where TRL has asked its head for the loss, else "model".
    """

    def __init__(self, joules: Callable[[], float | None]):
        self._joules = joules
        self.shape: tuple[int, int] | None = None
        self.loss = "model"
        self._tokens = 0  # of this step so far
        self._energy: float | None = None  # at the end of the step before
        self._steps: list[tuple[int, float, float | None]] = []  # tokens, seconds, joules

    def watch(self, model: nn.Module) -> Callable[[], None]:
        """Count the tokens of each forward that is trained on; returns what undoes it."""
        self._energy = self._joules()
        return model.register_forward_pre_hook(self._forward, with_kwargs=True).remove

    def step(self, seconds: float, counted: bool) -> None:
        """The end of a step that took so long."""
        before, self._energy = self._energy, self._joules()
        if counted:
            used = None if before is None or self._energy is None else self._energy - before
            self._steps.append((self._tokens, seconds, used))
        self._tokens = 0

    def report(self, model: nn.Module | None, card: str) -> dict[str, float | None]:
        """Of the median step ``tokens_per_step``, ``tokens_per_second`` and the model FLOPs utilisation ``mfu``; of all
        counted steps ``joules`` and ``tokens_per_joule``. None where tokens, card, model or energy are not known.
        """
        tokens = sum(step[0] for step in self._steps)
        speeds = [step[0] / step[1] for step in self._steps if step[1]]
        used = [step[2] for step in self._steps]
        joules = None if not used or None in used else sum(filter(None, used))
        speed = statistics.median(speeds) if tokens and speeds else None
        return {
            "tokens_per_step": statistics.median(step[0] for step in self._steps) if tokens else None,
            "tokens_per_second": speed,
            "mfu": self._utilisation(model, card, speed),
            "joules": joules,
            "tokens_per_joule": tokens / joules if tokens and joules else None,
        }

    def _utilisation(self, model: nn.Module | None, card: str, speed: float | None) -> float | None:
        peak = peak_flops(card)
        while isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # type: ignore[union-attr,assignment]
        known = hasattr(getattr(model, "config", None), "get_text_config")
        if peak is None or speed is None or self.shape is None or not known:
            return None
        return flops_per_token(model, self.shape[1]) * speed / peak

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if kwargs.get("fused_lm_head"):
            self.loss = "trl"
        ids, embedded = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            shape = ids.size(0), ids.size(1)
        elif isinstance(embedded, Tensor) and embedded.dim() == 3:
            shape = embedded.size(0), embedded.size(1)
        else:
            return
        self._tokens += shape[0] * shape[1]
        if self.shape is None or shape[0] * shape[1] > self.shape[0] * self.shape[1]:
            self.shape = shape
