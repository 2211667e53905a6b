"""What the tests of a comparison share: a tiny one of each task, and rows as a run would leave them."""

import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from experiments.comparison.plan import Plan, Run, load_plan

SHAPE = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "attention_dropout": 0.1,
}  # fmt: skip
TRAINING = {"steps": 4, "batch_size": 2, "eval_every": 2, "warmup_steps": 1, "max_grad_norm": 1.0}
OPTIMIZERS = {"AdamW": {"lr": 1e-3}, "MoFaSGD": {"rank": 4, "lr": [5e-4, 2e-3]}}
WORDS = ["good", "bad", "fine", "dull", "film", "plot"]


def language_comparison(folder: Path, **sections: Any) -> Path:
    """The YAML of a comparison on a few kB of text, with its files; sections may be replaced."""
    (folder / "shape.json").write_text(json.dumps(SHAPE))
    for split, lines in (("train", 60), ("eval", 20)):
        (folder / f"{split}.txt").write_text("".join(f"{split} line {i} of {lines}\n" for i in range(lines)))
    content = {
        "task": {
            "name": "lm",
            "model_config": str(folder / "shape.json"),
            "data_dir": str(folder),
            "length": 16,
            "eval_examples": 4,
        },
        "training": TRAINING,
        "seeds": [0, 1],
        "optimizers": OPTIMIZERS,
        **sections,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def language_plan(folder: Path, **sections: Any) -> Plan:
    return load_plan(language_comparison(folder, **sections))


def sentences(folder: Path, **counts: int) -> Path:
    """train.txt, dev.txt and test.txt of sentences of two to four words."""
    for split in ("train", "dev", "test"):
        lines = [f"{i % 2} {' '.join(WORDS[i % 5 : i % 5 + 2 + i % 3])}" for i in range(counts.get(split, 12))]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def tiny_encoder(folder: Path, width: int = 16) -> Path:
    """A BERT of one layer with its tokenizer, as ``save_pretrained`` leaves them, without a trained head."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
    )
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    return folder


def row(run: Run, dev: float, test: float = 0.0, *, diverged_at: int | None = None, **changes: Any) -> dict[str, Any]:
    """A row as ``experiments/compare.py`` would write it, of a task whose metric is the loss or the accuracy."""
    evaluations = [
        {"step": step, "seconds": step / 2, "units": 8 * step, "loss": dev, "accuracy": dev} for step in (0, 2, 4)
    ]
    return {
        "key": run.key,
        "seed": run.seed,
        "train_loss": [dev] * 4,
        "evaluations": evaluations,
        "test": None if diverged_at else {"loss": test, "accuracy": test},
        "diverged_at": diverged_at,
        "units_per_second": 1000.0,
        "state_bytes": 2_000_000,
        "peak_allocated": None,
        "peak_resident": 1_500_000_000,
        "trained_parameters": 3_000_000,
        "control": {"weights": "w", "batches": "b", "held out": "h"},
        "environment": {"device": "CPU, 1 threads", "torch": "2.13"},
        **changes,
    }
