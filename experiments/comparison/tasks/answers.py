"""Fine-tuning of a pre-trained decoder on prompts with answers: the loss is on the answers alone."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.comparison.digests import digest_of_files
from experiments.comparison.tasks.base import Batch, Split, Task, shuffled
from experiments.comparison.tasks.decoder import files_of, load_decoder
from launch.encoding import IGNORED
from launch.errors import UserError
from launch.examples import encoded_records
from launch.tokenizer import load_tokenizer

__all__ = ["Answers"]

Example = tuple[list[int], list[int]]  # token ids, and labels of the same length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers(Task):
    """Prompts and answers, instructions or chats, one JSON record a line (:mod:`launch.records`).

    Attributes:
        pretrained: a folder or Hub name; comes with its tokenizer.
        data_dir: folder with files that end in train.jsonl and in dev.jsonl.
        prefix: of the names of those to take, such as "en-"; empty: all.
        length: tokens of an example at most; longer ones are left out, for their answers would be cut.
        eval_batch_size: examples of an evaluation's batch.

    Of the held-out records the first, third and so on are "dev", the others "test".
    """

    name = "answers"
    metric = "loss"
    higher_is_better = False
    unit = "tokens"

    pretrained: str | None = None
    data_dir: str | None = None
    prefix: str = ""
    length: int = 512
    eval_batch_size: int = 32

    def __post_init__(self):
        for option, meant in (("pretrained", "the folder of a decoder"), ("data_dir", "the folder of the records")):
            if getattr(self, option) is None:
                raise UserError(f"task answers: no {option}. Give --{option}, {meant}.")
        for option, least in (("length", 2), ("eval_batch_size", 1)):
            if getattr(self, option) < least:
                raise UserError(f"task.{option}: {getattr(self, option)} must be at least {least}.")

    def identity(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "length": self.length,
            "pretrained": files_of(self.pretrained),
            "data": [digest_of_files(self._files(split)) for split in ("train", "dev")],
        }

    def prepare(self) -> None:
        _ = self._examples  # read now, and kept

    def model(self, seed: int) -> nn.Module:
        return load_decoder(self.pretrained, self._tokenizer)

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        examples, _ = self._examples
        for chosen in shuffled(len(examples), batch_size, seed):
            yield self._padded([examples[i] for i in chosen])

    def held_out(self, split: Split) -> Sequence[Batch]:
        _, examples = self._examples
        # Sorted by length, a batch has little padding to compute.
        part = sorted(examples[split == "test" :: 2], key=lambda example: len(example[0]))
        size = self.eval_batch_size
        return [self._padded(part[start : start + size]) for start in range(0, len(part), size)]

    def units(self, batch: Batch) -> int:
        return int(batch["attention_mask"].sum())

    def weight(self, batch: Batch) -> int:
        """Answer tokens: of each of these the loss is one term. The first of a row has none that comes before it."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def save(self, model: nn.Module, folder: Path) -> None:
        super().save(model, folder)
        self._tokenizer.save_pretrained(folder)

    @functools.cached_property
    def _tokenizer(self):
        return load_tokenizer(self.pretrained)[0]

    def _files(self, split: str) -> list[Path]:
        files = sorted(Path(self.data_dir).glob(f"{self.prefix}*{split}.jsonl"))
        if not files:
            raise UserError(
                f"{self.data_dir}: no file is called {self.prefix}*{split}.jsonl. Task answers needs such files of train "
                "and of dev in --data_dir."
            )
        return files

    @functools.cached_property
    def _examples(self) -> tuple[list[Example], list[Example]]:
        """All that are not too long, of train and of dev. Small: they go to every process."""
        return self._read("train"), self._read("dev")

    def _read(self, split: str) -> list[Example]:
        files = tuple(map(str, self._files(split)))
        records = encoded_records(files, (), self._tokenizer, None)
        found = [(record["input_ids"], record["labels"]) for record in records]
        short = [example for example in found if len(example[0]) <= self.length]
        if len(short) < 2:
            raise UserError(
                f"{self.data_dir}: {len(short)} of {len(found)} records of {split} have at most {self.length} tokens, and two "
                "are needed. Set task.length higher."
            )
        return short

    def _padded(self, examples: Sequence[Example]) -> Batch:
        """On the right, where a causal model's other tokens do not see it."""
        shape = len(examples), max(len(ids) for ids, _ in examples)
        batch = {
            "input_ids": torch.full(shape, self._tokenizer.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        for row, (ids, labels) in enumerate(examples):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, : len(ids)] = torch.tensor(labels)
        return batch
