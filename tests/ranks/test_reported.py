"""Situations that other projects' users have reported, under DeepSpeed; docs/reported.md has the list."""

import functools
import json
from pathlib import Path

import torch
from comparing import STEPS, TOLERANCE, assert_same, dense
from deepspeed import comm as dist
from launching import on_ranks
from reference import Reference
from scenes.huggingface import forget_accelerate
from scenes.llama import OneLayer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toys import WIDTH, Toy, batches, micro_batches
from training import OPTIONS, config, toy, train, whole_weights
from transformers import Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config


class HalfCheckpointed(Toy):
    """A weight is used in a block that runs again in backward and, through its other module, after it."""

    reentrant = False

    def blocks(self):
        return [self.mix, self.widen, self.inside, self.echo]

    def run(self, block, x):
        return checkpoint(super().run, block, x, use_reentrant=self.reentrant) if block == self.inside else x + block(x)

    def inside(self, x):
        return torch.tanh(self.twin(self.echo(x)))


class FrozenNorm(Toy):
    """A frozen norm and a frozen linear in a block that runs again in backward."""

    def __init__(self):
        super().__init__()
        self.still = nn.LayerNorm(WIDTH).requires_grad_(False)

    def run(self, block, x):
        return checkpoint(super().run, block, x, use_reentrant=False)

    def repeat(self, x):
        return super().repeat(self.still(x))


def half_checkpointed(stage: int, reentrant: bool) -> dict:
    model = toy(HalfCheckpointed)
    model.reentrant = reentrant
    return train(config(stage), STEPS, model=model)


def frozen_in_checkpoint(persistence: int) -> dict:
    zero = {"stage3_param_persistence_threshold": persistence}
    return train(config(3, zero_optimization=zero), STEPS, model=toy(FrozenNorm))


@on_ranks(half_checkpointed, stage=[1, 2, 3], reentrant=[False, True])
def test_a_shared_weight_half_of_whose_uses_are_checkpointed(ran):
    """DeepSpeed#988, pytorch#81296: the hook on a weight runs once a use, not once a backward."""
    assert_same(ran, dense(HalfCheckpointed))


@on_ranks(frozen_in_checkpoint, persistence=[0, 40])
def test_frozen_weights_in_a_checkpointed_block_in_stage_3(ran):
    """transformers#47254, trl#2514: released weights in what the recomputation is compared with."""
    assert_same(ran, dense(FrozenNorm))


# ---------------------------------------------------------------------- answers of unequal length, by HF's Trainer

PER_DEVICE, MICRO, LENGTH = 2, 2, 8


class Answering(OneLayer):
    """Its loss is the mean over all labels that it is given."""

    def forward(self, tokens, labels):
        logits = self.model(input_ids=tokens).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def answers(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Global batches of two ranks: tokens, and labels of which one to seven are left."""
    made = []
    for tokens, _ in batches(steps):
        tokens = torch.cat([tokens[: 2 * PER_DEVICE * MICRO], tokens[: 2 * PER_DEVICE * MICRO, :2]], dim=1)
        asked = torch.tensor([7, 1, 2, 6, 1, 1, 5, 3])[:, None]  # tokens of each question
        made.append((tokens, torch.where(torch.arange(LENGTH) < asked, -100, tokens)))
    return made


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trained_on_answers(stage: int, fused: bool) -> dict:
    options = {**OPTIONS, "weight_decay": 0, "fused_head": fused}
    settings = {key: value for key, value in config(stage).items() if key != "optimizer"}
    settings |= {"optimizer": {"type": "MoFaSGD", "params": options}, "gradient_accumulation_steps": MICRO}
    settings["train_micro_batch_size_per_gpu"] = PER_DEVICE
    path = Path(f"rank{dist.get_rank()}.json")
    path.write_text(json.dumps(settings))
    arguments = TrainingArguments(
        output_dir="answers",
        use_cpu=True,
        deepspeed=str(path),
        per_device_train_batch_size=PER_DEVICE,
        gradient_accumulation_steps=MICRO,
        learning_rate=OPTIONS["lr"],
        weight_decay=0.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"input_ids": t, "labels": y} for tokens, labels in answers(STEPS) for t, y in zip(tokens, labels)]
    try:
        hf = InOrder(model=Answering().model, args=arguments, train_dataset=data)
        hf.train()
        engine = hf.model_wrapped
        result = {"weights": {f"model.{name}": weight for name, weight in whole_weights(engine.module).items()}}
        result["losses"] = [entry["loss"] for entry in hf.state.log_history if "loss" in entry]
        engine.destroy()
        return result
    finally:
        unset_hf_deepspeed_config()
        forget_accelerate()


@functools.cache
def dense_on_answers() -> dict:
    model = Answering()
    reference = Reference(
        model, Answering.MATRICES, lr=OPTIONS["lr"], rank=OPTIONS["rank"], beta=0.85, adamw_eps=OPTIONS["adamw_eps"]
    )
    losses = [reference.step(batch) for batch in answers(STEPS)]
    return {"losses": losses, "weights": reference.weights()}


def head_gradients(batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the first step, every label counting alike, and every micro-batch of every rank."""
    model = Answering().double()
    parts = [part for rank in range(2) for part in micro_batches(batch, rank, 2, MICRO)]
    losses = model(*batch), sum(model(*part) for part in parts) / len(parts)
    return tuple(torch.autograd.grad(loss, model.model.lm_head.weight)[0] for loss in losses)


def test_the_answers_are_of_unequal_length():
    by_label, by_part = head_gradients(answers(1)[0])
    assert float((by_label - by_part).norm() / by_label.norm()) > 0.1


@on_ranks(trained_on_answers, {"stage": 2, "fused": True}, {"stage": 3, "fused": False})
def test_every_label_of_a_step_counts_alike(ran):
    """transformers#35438, transformers#37766, transformers#34373: means of means over micro-batches and ranks."""
    wanted = dense_on_answers()
    for result in ran.ranks:
        for name, weight in wanted["weights"].items():
            assert float((result["weights"][name].double() - weight).norm() / weight.norm()) < TOLERANCE, name
        for seen, loss in zip(result["losses"], wanted["losses"], strict=True):
            assert abs(seen - loss) < 1e-4 * loss  # the Trainer writes it rounded
