"""TRL's GRPO for tests, a policy of bytes whose reward is small letters. Import it after ``pytest.importorskip("trl")``."""

from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from transformers import PreTrainedModel

from launch.tokenizer import byte_tokenizer


def letters(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of small letters among an answer's bytes."""
    return [sum(97 <= one < 123 for one in ids) / max(1, len(ids)) for ids in completion_ids]


def trainer_of(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, output: Path, **options: Any
) -> trl.GRPOTrainer:
    """On sixteen prompts, with a reference beside the policy, which was loaded from a folder."""
    settings = trl.GRPOConfig(
        output_dir=str(output), num_generations=8, beta=0.001, logging_steps=1, report_to=[], save_strategy="no",
        lr_scheduler_type="constant", gradient_checkpointing=False, disable_tqdm=True, **options,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=letters,
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"prompt": f"{i} "} for i in range(16)]),
        processing_class=byte_tokenizer(),
        optimizers=(optimizer, None),
    )
