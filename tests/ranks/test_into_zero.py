"""A run goes from FSDP2 into ZeRO and back, by ``python -m ds_mofa.to_universal``."""

from unittest import mock

import pytest
import torch
from comparing import equal
from deepspeed import comm as dist
from engines import whole
from launching import cases, on_ranks
from scenes.elastic import masters_of
from scenes.plain_torch import DATA, Seen, built, full
from scenes.torch_checkpoints import assert_continued, counters, end_of, load_file, saved
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from training import config, engine_for, toy, train_step, whole_momenta, whole_weights

import ds_mofa
from ds_mofa import to_universal
from ds_mofa.backends.deepspeed import torch_form

MASTERS = {"dtype": "bfloat16", "master_weights": True}


def command(*words: str) -> None:
    """Run it on the first rank."""
    if dist.get_rank() == 0:
        with mock.patch("sys.argv", ["to_universal", *words]):
            to_universal.main()
    dist.barrier()


def end_of_engine(engine) -> dict:
    losses = [train_step(engine, batch) for batch in DATA[3:]]
    return {"losses": losses, "weights": whole_weights(engine.module), "momenta": whole_momenta(engine)}


def steps_of(engine) -> list[int]:
    moments = engine.basic_optimizer.adamw.state.values()
    return [engine.basic_optimizer.matrices.steps, *sorted({int(one["step"]) for one in moments if "step" in one})]


def settings_for(stage: int, dtype: str = "fp32", universal: bool = False, **options) -> dict:
    checkpoint = {"checkpoint": {"load_universal": True}} if universal else {}
    return config(stage, dtype=dtype, gradient_clipping=0.5, options=options, **checkpoint)


def into_zero(before: str, stage: int, source: str, dtype: str = "fp32", **options) -> dict:
    """The other three steps, in an engine that starts from other weights."""
    command("--from_torch", f"{before}/{source}", "--output_folder", "universal")
    with engine_for(settings_for(stage, dtype, True, **options), model=toy(Seen, seed=1)) as engine:
        engine.load_checkpoint(".", tag="universal", load_lr_scheduler_states=False)
        loaded = {"weights": whole_weights(engine.module), "seen": engine.module.seen.clone()}
        loaded |= {"counters": steps_of(engine), "masters": masters_of(engine), "steps": engine.global_steps}
        return {"loaded": loaded, "end": end_of_engine(engine)}


def zero(stage: int) -> dict:
    """Six steps in an engine; after three a universal checkpoint, and a file of it for torch."""
    with engine_for(settings_for(stage), model=toy(Seen)) as engine:
        for batch in DATA[:3]:
            train_step(engine, batch)
        engine.save_checkpoint(".", tag="third")
        now = {"weights": whole_weights(engine.module), "seen": engine.module.seen.clone()}
        command("--input_folder", "third", "--output_folder", "universal", "--workers", "1")
        command("--input_folder", "universal", "--to_torch", "torch.pt")
        return {"now": now, "end": end_of_engine(engine)}


def out_of_zero(before: str, engine: str) -> dict:
    """The other three steps, by a loop without DeepSpeed."""
    model, optimizer = built(engine, seed=1)
    load_file(model, optimizer, f"{before}/torch.pt")
    loaded = {"weights": whole(model), "seen": full(model.seen), "counters": counters(optimizer)}
    rates = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"loaded": loaded, "end": end_of(model, optimizer), "rates": [group["lr"] for group in rates]}


SOURCES = ["full.pt", "dcp"]


@on_ranks(into_zero, world=[1, 3], after=cases(saved), stage=[1, 2, 3], source=SOURCES, pairwise=True)
def test_from_fsdp2_into_zero(ran):
    assert_continued(ran)
    for result in ran.ranks:
        assert equal(result["loaded"]["seen"], ran.before.ranks[0]["now"]["seen"]) and result["loaded"]["steps"] == 3


@on_ranks(out_of_zero, {"engine": "fsdp2"}, world=[1, 3], after=cases(zero, stage=[2, 3]))
def test_from_zero_into_fsdp2(ran):
    assert_continued(ran)
    for result in ran.ranks:
        assert equal(result["loaded"]["seen"], ran.before.ranks[0]["now"]["seen"]) and set(result["rates"]) == {2e-3}


@on_ranks(
    into_zero, {**MASTERS, "dtype": "bf16"}, world=[1], after=cases(saved, MASTERS), stage=[2], source=["full.pt"]
)
def test_masters_come_along(ran):
    (result,), first = ran.ranks, ran.before.ranks[0]["now"]
    assert equal(result["loaded"]["masters"], {name: value.flatten() for name, value in first["masters"].items()})
    assert not equal(result["loaded"]["masters"]["blend"], first["weights"]["blend"].float().flatten())


def trained_alone(optimizer: type, **options) -> dict:
    """A run of one process, by names."""
    model = toy(Seen)
    chosen = optimizer(model, lr=2e-3, rank=4, **options)
    for batch in DATA[:2]:
        model(*batch).backward()
        chosen.step()
        chosen.zero_grad()
    whole = StateDictOptions(full_state_dict=True)
    states = {
        "model": get_model_state_dict(model, options=whole),
        "optim": get_optimizer_state_dict(model, chosen, options=whole),
    }
    chosen.detach()
    return states


@pytest.mark.parametrize("optimizer", [ds_mofa.MoFaSGD, ds_mofa.GaLore])
def test_there_and_back_everything_is_as_it_was(tmp_path, optimizer):
    state = trained_alone(optimizer)
    torch_form.to_universal(state, tmp_path / "universal")
    back = torch_form.from_universal(tmp_path / "universal")
    assert equal(back["model"], dict(state["model"]))
    assert equal(back["optim"]["state"], state["optim"]["state"])
    for there, here in zip(back["optim"]["param_groups"], state["optim"]["param_groups"], strict=True):
        assert sorted(there["params"]) == sorted(here["params"])
        assert all(here[key] == value for key, value in there.items() if key != "params")


@pytest.mark.parametrize(
    "what, message",
    [
        ({"model": {}, "optim": {"state": {}, "param_groups": [{"params": [0]}]}}, "positions in the place of names"),
        ({"model": {}, "optim": {"state": {"w": {"exp_avg": torch.ones(1)}}, "param_groups": []}}, "AdamW alone"),
        ({"weights": {}}, "get_optimizer_state_dict"),
        ({"model": {}, "optim": {"state": {"w": {"exp_avg_codes": torch.ones(1)}}, "param_groups": []}}, "8 bits"),
    ],
)
def test_what_is_no_run_of_this_package_is_refused_with_the_way_out(tmp_path, capsys, what, message):
    torch.save(what, tmp_path / "state.pt")
    words = ["to_universal", "--from_torch", str(tmp_path / "state.pt"), "--output_folder", str(tmp_path / "out")]
    with mock.patch("sys.argv", words), pytest.raises(SystemExit):
        to_universal.main()
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
