"""torch.distributed.checkpoint: what one run saves another resumes, on the same ranks bit for bit, on others to rounding."""

import torch
import torch.distributed.checkpoint as dcp
from comparing import TOLERANCE, equal
from deepspeed import comm as dist
from launching import cases, on_ranks
from scenes.plain_torch import DATA, built, full, lessons, momenta, run, weights
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from toys import Toy

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
WAYS = ["dcp", "flat", "full"]
BF16 = {"dtype": "bfloat16"}
MASTERS = {"dtype": "bfloat16", "master_weights": True}


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
        first = dist.get_rank() == 0
        state = torch.load(f"{folder}/full.pt", weights_only=True) if first else {"model": {}, "optim": {}}
        set_model_state_dict(model, state["model"], options=FROM_FIRST)
        set_optimizer_state_dict(model, optimizer, state["optim"], options=FROM_FIRST)
        return
    options = FLAT if way == "flat" else None
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(state, checkpoint_id=f"{folder}/{way}")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"], options=options)


def counters(optimizer) -> list[int]:
    """Steps: of the matrices, and of each of AdamW's parameters."""
    return [optimizer.matrices.steps, *sorted({int(one["step"]) for one in optimizer.adamw.state.values()})]


def end_of(model, optimizer) -> dict:
    losses = run(model, optimizer, DATA[3:])
    return {"losses": losses, "weights": weights(model), "momenta": momenta(optimizer)}


def saved(engine: str = "fsdp2", **options) -> dict:
    """Six steps, saved after three; and what a reader finds before the first."""
    model, optimizer = built(engine, **options)
    before, first = weights(model), get_optimizer_state_dict(model, optimizer)
    keys = sorted(f"{name} {key}" for name, one in first["state"].items() for key in one)
    fresh = {
        "keys": keys,
        "steps": counters(optimizer),
        "moved": not equal(weights(model), before),
        "left": [name for name, param in model.named_parameters() if param.grad is not None],
        "rows": {name: tuple(one["U"].to_local().shape) for name, one in first["state"].items() if is_cut(one, "U")},
        "lr": [group["lr"] for group in optimizer.param_groups],
    }
    run(model, optimizer, DATA[:3])
    state = get_optimizer_state_dict(model, optimizer)["state"]
    save(model, optimizer)
    masters = {name: one["master"] for name, one in state.items() if "master" in one}
    plain = [name for name, master in masters.items() if not isinstance(master, DTensor)]
    now = {"counters": counters(optimizer), "weights": weights(model), "plain masters": plain}
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
    loaded = {"counters": counters(optimizer), "weights": weights(model), "masters": masters}
    return {"loaded": loaded, "end": end_of(model, optimizer)}


SAVED = cases(saved)


@on_ranks(saved, {}, BF16, MASTERS)
def test_a_reader_finds_the_state_before_the_first_step_and_takes_none(ran):
    fresh = ran.ranks[0]["fresh"]
    for result in ran.ranks:
        assert result["fresh"]["keys"] == fresh["keys"]
        assert result["fresh"]["steps"] == [0, 0] and not result["fresh"]["moved"] and not result["fresh"]["left"]
        assert set(result["fresh"]["lr"]) == {1e-2}
        assert result["now"]["counters"] == [3, 3]
    assert {f"{name} {key}" for name in Toy.MATRICES for key in ("U", "V", "sigma", "step")} <= set(fresh["keys"])
    # Nine others that AdamW trains: their moments are there too.
    assert sum(key.endswith("exp_avg_sq") for key in fresh["keys"]) == 5
    rows = [result["fresh"]["rows"] for result in ran.ranks]
    assert [part["up.weight"] for part in rows] == [(27, 4), (26, 4)]


@on_ranks(saved, MASTERS)
def test_masters_are_dtensors_and_not_the_weights(ran):
    now = ran.ranks[0]["now"]
    assert now["masters"].keys() == set(Toy.MATRICES) and not now["plain masters"]
    for name, master in now["masters"].items():
        assert torch.equal(master.bfloat16(), now["weights"][name]) and not torch.equal(
            master, now["weights"][name].float()
        )


@on_ranks(resumed, after=SAVED, way=WAYS)
def test_on_the_same_ranks_it_is_the_uninterrupted_run_bit_for_bit(ran):
    assert_the_same_bits(ran)


@on_ranks(resumed, BF16, after=cases(saved, BF16), way=["dcp"])
def test_stochastic_rounding_goes_on_with_the_same_bits(ran):
    assert_the_same_bits(ran)


@on_ranks(resumed, MASTERS, after=cases(saved, MASTERS), way=WAYS)
def test_masters_go_on_with_the_same_bits(ran):
    assert_the_same_bits(ran)
    assert equal(ran.ranks[0]["loaded"]["masters"], ran.before.ranks[0]["now"]["masters"])


def assert_the_same_bits(ran) -> None:
    for result, first in zip(ran.ranks, ran.before.ranks, strict=True):
        assert result["loaded"]["counters"] == [3, 3]
        assert equal(result["loaded"]["weights"], first["now"]["weights"])
        for what in ("losses", "weights", "momenta"):
            assert equal(result["end"][what], first["end"][what]), what
        assert not equal(result["end"]["weights"], first["now"]["weights"])


@on_ranks(resumed, world=[1, 3], after=SAVED, way=WAYS)
def test_on_more_or_fewer_ranks_it_goes_on_to_rounding(ran):
    assert_continued(ran)


@on_ranks(resumed, {"engine": "hsdp", "way": "dcp"}, {"engine": "fsdp2", "way": "full"}, world=[4], after=SAVED)
def test_on_four_ranks_and_in_replicas_of_two_shards(ran):
    assert_continued(ran)


@on_ranks(resumed, {"engine": "ddp"}, world=[3], after=SAVED, way=["full"])
def test_into_distributed_data_parallel(ran):
    assert_continued(ran)


@on_ranks(resumed, {"engine": "one"}, world=[1], after=SAVED, way=["full"])
def test_into_one_process_without_fully_shard(ran):
    assert_continued(ran)


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
