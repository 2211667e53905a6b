"""A run that is saved by torch.distributed.checkpoint after three of six steps, and one that goes on from its files."""

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from comparing import TOLERANCE, equal
from deepspeed import comm as dist
from engines import momenta, whole
from scenes.plain_torch import DATA, built, full, lessons, run
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def save(model, optimizer) -> None:
    """In each of the three ways, into the scene's folder."""
    held = get_model_state_dict(model)
    dcp.save({"model": held, "optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id="dcp")
    dcp.save({"model": held, "optim": get_optimizer_state_dict(model, optimizer, options=FLAT)}, checkpoint_id="flat")
    whole = {
        "model": get_model_state_dict(model, options=FULL),
        "optim": get_optimizer_state_dict(model, optimizer, options=FULL),
    }
    if dist.get_rank() == 0:
        torch.save(whole, "full.pt")
    dist.barrier()


def load(model, optimizer, way: str, folder: str) -> None:
    if way == "full":
        load_file(model, optimizer, f"{folder}/full.pt")
        return
    options = FLAT if way == "flat" else None
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(state, checkpoint_id=f"{folder}/{way}")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"], options=options)


def load_file(model, optimizer, path: str) -> None:
    first = dist.get_rank() == 0
    state: dict[str, Any] = torch.load(path, weights_only=True) if first else {"model": {}, "optim": {}}
    set_model_state_dict(model, state["model"], options=FROM_FIRST)
    set_optimizer_state_dict(model, optimizer, state["optim"], options=FROM_FIRST)


def counters(optimizer) -> list[int]:
    """Steps: of the matrices, and of each of AdamW's parameters."""
    return [optimizer.matrices.steps, *sorted({int(one["step"]) for one in optimizer.adamw.state.values()})]


def end_of(model, optimizer) -> dict:
    losses = run(model, optimizer, DATA[3:])
    return {"losses": losses, "weights": whole(model), "momenta": momenta(optimizer)}


def saved(engine: str = "fsdp2", **options) -> dict:
    """Six steps, saved after three; and what a reader finds before the first."""
    model, optimizer = built(engine, **options)
    before, first = whole(model), get_optimizer_state_dict(model, optimizer)
    keys = sorted(f"{name} {key}" for name, one in first["state"].items() for key in one)
    fresh = {
        "keys": keys,
        "steps": counters(optimizer),
        "moved": not equal(whole(model), before),
        "left": [name for name, param in model.named_parameters() if param.grad is not None],
        "rows": {name: tuple(one["U"].to_local().shape) for name, one in first["state"].items() if is_cut(one, "U")},
        "lr": [group["lr"] for group in optimizer.param_groups],
    }
    run(model, optimizer, DATA[:3])
    state = get_optimizer_state_dict(model, optimizer)["state"]
    save(model, optimizer)
    masters = {name: one["master"] for name, one in state.items() if "master" in one}
    plain = [name for name, master in masters.items() if not isinstance(master, DTensor)]
    now = {"counters": counters(optimizer), "weights": whole(model), "plain masters": plain, "seen": full(model.seen)}
    now["masters"] = {name: full(master) for name, master in masters.items()}
    return {"fresh": fresh, "now": now, "end": end_of(model, optimizer)}


def is_cut(state: dict, key: str) -> bool:
    return isinstance(state.get(key), DTensor)


def resumed(before: str, way: str, engine: str = "fsdp2", **options) -> dict:
    """The other three steps, by an optimizer that has trained other weights on something else."""
    model, optimizer = built(engine, seed=1, **options)
    run(model, optimizer, lessons(2, seed=7))
    load(model, optimizer, way, before)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    masters = {name: full(one["master"]) for name, one in state.items() if "master" in one}
    loaded = {"counters": counters(optimizer), "weights": whole(model), "masters": masters}
    return {"loaded": loaded, "end": end_of(model, optimizer)}


def assert_continued(ran) -> None:
    first = ran.before.ranks[0]
    for result in ran.ranks:
        assert result["loaded"]["counters"] == [3, 3]
        assert equal(result["loaded"]["weights"], first["now"]["weights"])
        far = distances(result["end"], first["end"])
        assert max(far.values()) < TOLERANCE, far


def distances(end: dict, wanted: dict) -> dict[str, float]:
    far = {"losses": max(abs(x - y) / y for x, y in zip(end["losses"], wanted["losses"], strict=True))}
    for kind in ("weights", "momenta"):
        far[kind] = max(
            (float((x - wanted[kind][name]).norm() / wanted[kind][name].norm()) for name, x in end[kind].items()),
            default=0.0,
        )
    return far
