"""What a task is: a model to start from, batches in an order that the seed alone decides, and a measure."""

import abc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import logging as transformers_logging

__all__ = ["Batch", "Split", "Task", "shuffled"]

Batch = dict[str, Tensor]  # the arguments of a Hugging Face model, "labels" among them
Split = Literal["dev", "test"]


class Task(abc.ABC):
    """Everything in a run but its optimizer. Subclasses are frozen dataclasses of what the YAML sets.

    Attributes:
        metric: the name, among what :meth:`evaluate` returns, by which settings are chosen (on "dev") and reported
            (on "test").
        higher_is_better: of the metric.
        percent: whether to show the metric, a share, in percent.
        unit: of which :meth:`units` counts how many a batch has.
        head_modules: names of modules that have no pre-trained weights, which LoRA has to train in full.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    percent: ClassVar[bool] = False
    unit: ClassVar[str]
    head_modules: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that decides the outcome, as JSON: options, and files by their hashes rather than their paths.

        Raises:
            UserError: a file is missing.
        """

    def prepare(self) -> None:
        """Read what every run needs, once: it goes along when the task is sent to a run's process."""

    @abc.abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A new model on the CPU in fp32, whose weights depend on the seed alone; its forward returns a ``loss``."""

    @abc.abstractmethod
    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Training batches without end, in an order that depends on the seed alone."""

    @abc.abstractmethod
    def held_out(self, split: Split) -> Sequence[Batch]:
        """The batches of an evaluation, the same each time."""

    @abc.abstractmethod
    def units(self, batch: Batch) -> int:
        """How many of ``unit`` a batch has, of which the throughput is per second."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a trained model so that transformers can load it; LoRA's adapters become part of their matrices."""
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        transformers_logging.disable_progress_bar()
        model.save_pretrained(folder)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Sequence[Batch], device: torch.device) -> dict[str, float]:
        """The mean of what :meth:`measure` returns, each batch by its :meth:`weight`."""
        was_training = model.training
        model.eval()
        sums: dict[str, float] = {}
        for batch in batches:
            batch = to_device(batch, device)
            output = model(**batch)
            for name, value in self.measure(output, batch).items():
                sums[name] = sums.get(name, 0.0) + value.item() * self.weight(batch)
        model.train(was_training)
        total = sum(map(self.weight, batches))
        return {name: value / total for name, value in sums.items()}

    def weight(self, batch: Batch) -> int:
        """Of how many equal parts a batch's measures are means: its examples."""
        return len(batch["labels"])

    def measure(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Means over a batch, ``metric`` among them."""
        return {"loss": output.loss}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def shuffled(examples: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Indices of batch after batch without end: a new permutation per epoch, and batches that straddle two of them
    rather than a short one.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += torch.randperm(examples, generator=generator).tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
