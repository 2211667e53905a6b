"""A run that is saved, ended and resumed is the run that went on, bit for bit; and the files hold what they must."""

from collections.abc import Iterator
from pathlib import Path

import torch
from comparing import equal
from deepspeed import comm as dist
from launching import on_ranks
from scenes.resuming import DATA, OFFLOADED, assert_resumed, end_of, saved_and_resumed
from toys import Toy, micro_batches
from training import config, engine_for, toy, train_step


def files(stage: int, dtype: str) -> dict:
    """What the checkpoint of a short run holds, as far as it is ours."""
    with engine_for(config(stage, dtype=dtype)) as engine:
        for batch in DATA[:2]:
            train_step(engine, batch)
        engine.save_checkpoint("saved", tag="here")
    result = {}
    dist.barrier()
    if dist.get_rank() == 0:
        own = list(entries_of_ours(Path("saved/here")))
        torch.save(own, "own.pt")
        result["own"] = torch.load("own.pt", weights_only=True)
        result["strange"] = [name for entry in own for name in strange_types(entry)]
    return result


def entries_of_ours(folder: Path) -> Iterator[dict]:
    """Every "mofasgd" entry in any file of a checkpoint."""
    for path in sorted(folder.glob("*.pt")):
        state = torch.load(path, weights_only=False)
        optimizer = state.get("optimizer_state_dict") or state.get("optimizer")
        if optimizer and "mofasgd" in optimizer:
            yield optimizer["mofasgd"]


def strange_types(value) -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from strange_types(key)
            yield from strange_types(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from strange_types(part)
    elif type(value) not in (torch.Tensor, int, float, str, bool, type(None)):
        yield type(value).__name__


@on_ranks(saved_and_resumed, stage=[0, 1, 2, 3], dtype=["fp32", "bf16"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(ran):
    assert_resumed(ran)


@on_ranks(saved_and_resumed, stage=[0, 2, 3], dtype=["bf16"], options=[{"master_weights": True}])
def test_masters_are_resumed_bit_for_bit(ran):
    """Whole ones, which rank 0 saves for all, and shards: without them the weights would start half a spacing off."""
    assert_resumed(ran)


@on_ranks(saved_and_resumed, *OFFLOADED, dtype=["bf16"], options=[{"torch_adam": False}])
def test_an_offloaded_run_is_resumed_bit_for_bit(ran):
    assert_resumed(ran)


@on_ranks(saved_and_resumed, stage=[1, 2, 3], dtype=["fp16"], fp16=[{"initial_scale_power": 8, "loss_scale_window": 2}])
def test_fp16_is_resumed_bit_for_bit_with_its_loss_scale(ran):
    assert_resumed(ran)


def saved_within_an_accumulation(stage: int) -> dict:
    """What resumes after the third step of a run: a checkpoint of then, and one of half a step later."""
    settings = config(stage, dtype="bf16", micro=3)
    with engine_for(settings) as engine:
        for batch in DATA[:3]:
            train_step(engine, batch)
        engine.save_checkpoint("saved", tag="between")
        for tokens, targets in list(micro_batches(DATA[3], dist.get_rank(), dist.get_world_size(), 3))[:2]:
            engine.backward(engine(tokens, targets))
            engine.step()
        engine.save_checkpoint("saved", tag="within")
    ends = {}
    for tag in ("between", "within"):
        with engine_for(settings, model=toy(seed=1)) as engine:
            engine.load_checkpoint("saved", tag=tag)
            ends[tag] = end_of(engine)
    return ends


@on_ranks(saved_within_an_accumulation, stage=[0, 2, 3])
def test_sketches_of_half_a_step_are_dropped_as_gradients_are(ran):
    for result in ran.ranks:
        assert equal(result["between"], result["within"])


@on_ranks(files, stage=[0, 1, 2, 3], dtype=["fp32", "bf16"])
def test_our_state_is_tensors_numbers_and_strings_only(ran):
    assert ran.ranks[0]["own"], "no file has our state"
    assert ran.ranks[0]["strange"] == []
    matrices = [name for entry in ran.ranks[0]["own"] for name in entry.get("matrices", {}).get("matrices", {})]
    assert set(matrices or ran.ranks[0]["own"][0]["matrices"]) == set(Toy.MATRICES)
