"""SST-2: is a sentence from a film review positive? A pre-trained encoder, fine-tuned with a two-class head."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.comparison.digests import digest_of_files
from experiments.comparison.tasks.base import Batch, Split, Task, shuffled
from experiments.comparison.tasks.encoder import (
    PACKAGE,
    encoder_files,
    load_classifier,
    load_encoder_tokenizer,
    new_classifier,
)
from launch.errors import UserError
from launch.json_files import read_json

__all__ = ["Sst2", "read_sentences"]

_EVAL_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sst2(Task):
    """Fine-tuning on SST-2, or on any other sentences with two labels; or training on them from random weights.

    Attributes:
        data_dir: folder with train.txt, dev.txt and test.txt, each line a label, 0 or 1, a space and a sentence.
        encoder: the name of the package that carries one, or the folder of another.
        model_config: JSON with an encoder's shape (configs/models): random weights, and of ``encoder`` the tokenizer alone.
        max_length: tokens after which a sentence is cut.
    """

    name = "sst2"
    metric = "accuracy"
    higher_is_better = True
    percent = True
    unit = "examples"
    head_modules = ("classifier",)

    data_dir: str | None = None
    encoder: str = PACKAGE
    model_config: str | None = None
    max_length: int = 64

    def __post_init__(self):
        if self.data_dir is None:
            raise UserError(
                "task sst2: no data. Give --data_dir, a folder with train.txt, dev.txt and test.txt, each line a label "
                "(0 or 1), a space and a sentence."
            )
        if self.max_length < 3:
            raise UserError(f"task.max_length: {self.max_length} must be at least 3, for two of them are marks.")

    def identity(self) -> dict[str, Any]:
        data = [self._file(split) for split in ("train", "dev", "test")]
        identity = {
            "name": self.name,
            "max_length": self.max_length,
            "data": digest_of_files(data),
            "encoder": digest_of_files(encoder_files(self.encoder)),
        }
        if self.model_config is not None:  # without one the keys of runs that were made before it still hold
            identity["model_config"] = read_json(self.model_config, "task.model_config")
        return identity

    def model(self, seed: int) -> nn.Module:
        if self.model_config is not None:
            return new_classifier(self.model_config, self.encoder, classes=2, seed=seed)
        return load_classifier(self.encoder, classes=2, seed=seed)

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        labels, sentences = self._encoded("train")
        for chosen in shuffled(len(labels), batch_size, seed):
            yield self._padded([labels[i] for i in chosen], [sentences[i] for i in chosen])

    def held_out(self, split: Split) -> Sequence[Batch]:
        labels, sentences = self._encoded(split)
        # Sorted by length, a batch has little padding to compute.
        order = sorted(range(len(labels)), key=lambda i: len(sentences[i]))
        parts = (order[start : start + _EVAL_BATCH] for start in range(0, len(order), _EVAL_BATCH))
        return [self._padded([labels[i] for i in part], [sentences[i] for i in part]) for part in parts]

    def units(self, batch: Batch) -> int:
        return len(batch["labels"])

    def measure(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        hits = output.logits.argmax(dim=-1) == batch["labels"]
        return {"loss": output.loss, "accuracy": hits.float().mean()}

    def _file(self, split: str) -> Path:
        file = Path(self.data_dir) / f"{split}.txt"
        if not file.is_file():
            raise UserError(f"{file}: no such file. task sst2 needs train.txt, dev.txt and test.txt in --data_dir.")
        return file

    @functools.cached_property
    def _tokenizer(self):
        return load_encoder_tokenizer(self.encoder)

    def _encoded(self, split: str) -> tuple[list[int], list[list[int]]]:
        labels, sentences = read_sentences(self._file(split))
        encoded = self._tokenizer(sentences, truncation=True, max_length=self.max_length)
        return labels, encoded["input_ids"]

    def _padded(self, labels: list[int], sentences: list[list[int]]) -> Batch:
        batch = self._tokenizer.pad({"input_ids": sentences}, return_tensors="pt")
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": torch.tensor(labels),
        }


def read_sentences(file: Path) -> tuple[list[int], list[str]]:
    """Labels and sentences of a file.

    Raises:
        UserError: a line is not a label, 0 or 1, a space and a sentence; or there is no line.
    """
    labels, sentences = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        label, _, sentence = line.partition(" ")
        if label not in ("0", "1") or not sentence.strip():
            raise UserError(f"{file}, line {number}: {line[:40]!r} is not a label, 0 or 1, a space and a sentence.")
        labels.append(int(label))
        sentences.append(sentence)
    if not labels:
        raise UserError(f"{file}: empty. Each line is a label, 0 or 1, a space and a sentence.")
    return labels, sentences
