"""The toy rule of tests/extending under DeepSpeed. It says nothing of ranks, and trains at every stage as in one process."""

import functools

import pytest
import torch
from comparing import equal
from launching import on_ranks
from toys import batches, including
from training import OPTIONS, toy, train

from tests.extending.toy_rule import Toy

SETTINGS = {**OPTIONS, "lr": 0.3, "adamw_lr": 1e-2}


def lessons(stage: int) -> dict:
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 40} if stage == 3 else {})}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Toy", "params": SETTINGS},
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
    }
    return train(settings, 4)


@functools.cache
def alone() -> tuple[list[float], dict[str, torch.Tensor]]:
    model = toy()
    optimizer = Toy(model, **{key: value for key, value in SETTINGS.items() if key != "torch_adam"}, **including(model))
    losses = []
    for batch in batches(5)[:4]:
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: param.detach() for name, param in model.named_parameters()}


@on_ranks(lessons, world=[2], stage=[0, 2, 3])
def test_it_trains_as_in_one_process(ran):
    losses, weights = alone()
    first, second = ran.ranks
    assert first["losses"] == second["losses"] and equal(first["weights"], second["weights"])
    assert first["losses"][:4] == pytest.approx(losses, rel=1e-4) and losses[3] < losses[0]
    for name, weight in weights.items():
        assert torch.allclose(first["weights"][name], weight, rtol=1e-3, atol=1e-4), name
