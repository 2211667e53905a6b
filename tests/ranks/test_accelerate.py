"""Accelerate without DeepSpeed: one process, DDP, and FSDP2 by a plugin as ``accelerate config`` writes it."""

import contextlib
import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparing import TOLERANCE, equal
from engines import whole
from launching import on_ranks
from scenes.accelerating import accelerator_for, in_folder, restored
from scenes.huggingface import llama, sentences
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from transformers.optimization import get_linear_schedule_with_warmup

import ds_mofa
from ds_mofa.to_universal import read_torch

STEPS, BATCH, CLIP = 6, 12, 0.5
OPTIONS = {"lr": 2e-3, "rank": 4, "weight_decay": 0.1, "adamw_lr": 1e-3, "adamw_eps": 1e-6}


def batches() -> list[dict[str, Tensor]]:
    rows = torch.stack([row["input_ids"] for row in sentences(STEPS * BATCH)])
    return [{"input_ids": part, "labels": part} for part in rows.chunk(STEPS)]


def accelerated(engine: str, dtype: str = "float32", precision: str = "no", **plugin: Any) -> dict:
    """Six steps by Accelerate's loop, its state saved after three; then the last three again, from there."""
    printed = io.StringIO()
    with restored(), contextlib.redirect_stdout(printed):
        accelerator = accelerator_for(engine, precision, **plugin)
        model = llama().to(getattr(torch, dtype))
        optimizer = ds_mofa.MoFaSGD(model, **OPTIONS)
        many = accelerator.num_processes  # as many steps does Accelerate's scheduler take at a time
        schedule = get_linear_schedule_with_warmup(optimizer, 2 * many, 2 * STEPS * many)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        norms = go(accelerator, model, optimizer, schedule, range(3))
        accelerator.save_state("state")
        read = is_read(model, optimizer) if engine == "fsdp2" else None
        norms += go(accelerator, model, optimizer, schedule, range(3, STEPS))
        ended, steps = whole(model), [optimizer.optimizer.matrices.steps]
        accelerator.load_state("state")
        steps.append(optimizer.optimizer.matrices.steps)
        again = go(accelerator, model, optimizer, schedule, range(3, STEPS))
        working = str(optimizer.optimizer.matrices.working.dtype)
        return {
            "weights": ended,
            "resumed": whole(model),
            "norms": norms,
            "norms again": again,
            "steps": steps,
            "dtypes": [str(ended["model.layers.0.mlp.up_proj.weight"].dtype), working],
            "model": type(model).__name__,
            "output": printed.getvalue(),
            "read": read,
        }


def is_read(model: Any, optimizer: Any) -> bool:
    """Whether to_universal finds in the folder what the run has. Collective."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    held = get_model_state_dict(model, options=whole), get_optimizer_state_dict(model, optimizer, options=whole)
    found = read_torch(Path("state")) if dist.get_rank() == 0 else {}
    return not found or equal(found["model"], held[0]) and equal(found["optim"]["state"], held[1]["state"])


def go(accelerator: Any, model: Any, optimizer: Any, schedule: Any, numbers: range) -> list[float]:
    norms = []
    for batch in batches()[numbers.start : numbers.stop]:
        mine = {key: value.chunk(accelerator.num_processes)[accelerator.process_index] for key, value in batch.items()}
        accelerator.backward(model(**mine).loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return norms


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in one process, this one."""
    return in_folder(tmp_path_factory.mktemp("alone"), functools.partial(accelerated, "one"))


FSDP2 = [
    {},
    {"reshard_after_forward": False, "state_dict_type": "FULL_STATE_DICT"},
    {"cpu_ram_efficient_loading": True, "activation_checkpointing": True},
]


@on_ranks(accelerated, {"engine": "ddp"}, *[{"engine": "fsdp2", **plugin} for plugin in FSDP2])
def test_it_is_the_run_of_one_process_and_resumes_bit_for_bit(ran, alone):
    wanted = alone()
    assert min(wanted["norms"]) > 2 * CLIP
    for result in ran.ranks:
        assert result["model"] == {"ddp": "DistributedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}[ran.engine]
        assert result["weights"].keys() == wanted["weights"].keys()
        far = {name: distance(value, wanted["weights"][name]) for name, value in result["weights"].items()}
        assert max(far.values()) < TOLERANCE, far
        assert result["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert_resumed(result)
        assert result["read"] is not False


@on_ranks(accelerated, {"engine": "fsdp2", "dtype": "bfloat16", "precision": "bf16"})
def test_weights_that_accelerate_makes_fp32_on_the_way_are_a_line(ran):
    for rank, result in enumerate(ran.ranks):
        assert result["dtypes"] == ["torch.float32", "torch.bfloat16"]
        said = "14 matrices were bfloat16 when the optimizer was built and are float32 now" in result["output"]
        assert said == (rank == 0)
        assert_resumed(result)


def test_one_process_resumes_and_is_the_loop_without_accelerate(alone):
    result = alone()
    assert_resumed(result)
    model = llama()
    optimizer = ds_mofa.MoFaSGD(model, **OPTIONS)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 2 * STEPS)
    for batch in batches():
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert equal(whole(model), result["weights"])


def assert_resumed(result: dict) -> None:
    assert result["steps"] == [STEPS, 3]
    assert equal(result["resumed"], result["weights"])
    assert result["norms again"] == result["norms"][3:]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
