"""Causal language modelling: from random weights of a given shape, or on from pre-trained ones."""

import contextlib
import dataclasses
import functools
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from experiments.comparison.digests import digest_of_files
from experiments.comparison.tasks.base import Batch, Split, Task, shuffled
from experiments.comparison.tasks.decoder import files_of, load_decoder
from launch.errors import UserError
from launch.examples import encoded_records
from launch.json_files import read_json
from launch.make_corpus import make_corpus
from launch.shapes import check_vocabulary, config_from_shape
from launch.tokenizer import load_tokenizer

__all__ = ["LanguageModelling"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelling(Task):
    """Next-token prediction on text files.

    Attributes:
        model_config: JSON with a model's shape (configs/models): random weights, one token per byte.
        pretrained: a folder or Hub name, instead of ``model_config``; comes with its tokenizer.
        data_dir: folder with train.txt and eval.txt; null: sources of Python's standard library.
        corpus_bytes: how many bytes of those to train on, at most.
        length: tokens of an example.
        eval_examples: how many examples of eval.txt to evaluate on, half of them "dev" and half "test".
        eval_batch_size: examples of an evaluation's batch.
    """

    name = "lm"
    metric = "loss"
    higher_is_better = False
    unit = "tokens"

    model_config: str | None = None
    pretrained: str | None = None
    data_dir: str | None = None
    corpus_bytes: int = 4_000_000
    length: int = 256
    eval_examples: int = 256
    eval_batch_size: int = 32

    def __post_init__(self):
        if (self.model_config is None) == (self.pretrained is None):
            raise UserError("task lm: give either model_config (a shape, random weights) or pretrained (a folder).")
        for option, least in (("length", 2), ("eval_examples", 2), ("eval_batch_size", 1), ("corpus_bytes", 1)):
            if getattr(self, option) < least:
                raise UserError(f"task.{option}: {getattr(self, option)} must be at least {least}.")

    def identity(self) -> dict[str, Any]:
        options = {key: value for key, value in dataclasses.asdict(self).items() if key != "data_dir"}
        options["eval_batch_size"] = None  # how an evaluation is cut up does not change it
        if self.model_config is not None:
            options["model_config"] = read_json(self.model_config, "task.model_config")
        if self.pretrained is not None:
            options["pretrained"] = files_of(self.pretrained)
        with self._files() as files:
            return {"name": self.name, **options, "data": digest_of_files(files)}

    def prepare(self) -> None:
        _ = self._blocks  # read now, and kept

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if self.pretrained is not None:
            return load_decoder(self.pretrained, self._tokenizer)
        options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        model = AutoModelForCausalLM.from_config(config_from_shape(self.model_config), **options)
        check_vocabulary(model.config, self._tokenizer)
        model.config.use_cache = False
        return model

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        blocks, _ = self._blocks
        for chosen in shuffled(len(blocks), batch_size, seed):
            yield _batch(blocks[chosen])

    def held_out(self, split: Split) -> Sequence[Batch]:
        _, blocks = self._blocks
        if len(blocks) < self.eval_examples:
            raise UserError(
                f"task.eval_examples: there are only {len(blocks)} examples of {self.length} tokens to evaluate on, "
                f"and {self.eval_examples} are asked for. Ask for fewer, or give more text."
            )
        half = self.eval_examples // 2
        blocks = blocks[:half] if split == "dev" else blocks[half : 2 * half]
        size = self.eval_batch_size
        return [_batch(blocks[start : min(start + size, half)]) for start in range(0, half, size)]

    def save(self, model: nn.Module, folder: Path) -> None:
        super().save(model, folder)
        self._tokenizer.save_pretrained(folder)

    def units(self, batch: Batch) -> int:
        return batch["input_ids"].numel()

    @functools.cached_property
    def _tokenizer(self):
        return load_tokenizer(self.pretrained)[0]

    @contextlib.contextmanager
    def _files(self) -> Iterator[tuple[Path, Path]]:
        """Within: train.txt and eval.txt are there.

        Raises:
            UserError: ``data_dir`` has no such file.
        """
        if self.data_dir is None:
            with tempfile.TemporaryDirectory() as folder:
                make_corpus(Path(sysconfig.get_paths()["stdlib"]), Path(folder), self.corpus_bytes)
                yield Path(folder) / "train.txt", Path(folder) / "eval.txt"
            return
        files = Path(self.data_dir) / "train.txt", Path(self.data_dir) / "eval.txt"
        for file in files:
            if not file.is_file():
                raise UserError(
                    f"{file}: no such file. task lm needs train.txt and eval.txt in --data_dir, or no folder."
                )
        yield files

    @functools.cached_property
    def _blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """All whole examples of train.txt and of eval.txt, (examples, length) each. Small: they go to every process."""
        with self._files() as (train, held_out):
            return self._examples(train), self._examples(held_out)

    def _examples(self, file: Path) -> np.ndarray:
        records = encoded_records((str(file),), (), self._tokenizer, self.length)
        whole = [record["input_ids"] for record in records if len(record["input_ids"]) == self.length]
        if not whole:
            raise UserError(
                f"{file}: not one example of {self.length} tokens. Set task.length lower, or give more text."
            )
        return np.array(whole, dtype=np.uint16 if len(self._tokenizer) <= 2**16 else np.int32)


def _batch(ids: np.ndarray) -> Batch:
    tokens = torch.from_numpy(ids.astype(np.int64))
    return {"input_ids": tokens, "labels": tokens}
