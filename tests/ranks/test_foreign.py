"""States that are not this run's: another optimizer's, or with something missing, of another kind or not finite."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from comparing import equal
from deepspeed import comm as dist
from launching import on_ranks
from scenes.checkpoints import edit, state_of
from toys import batches
from training import config, engine_for, toy, train_step, whole_weights

from ds_mofa.backends.deepspeed import checkpoints
from ds_mofa.backends.deepspeed.checkpoints import MANIFEST

DATA = batches(3)
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
NAN = float("nan")


def without(key):
    return lambda state: state.pop(key)


def changed(key, change):
    return lambda state: state.update({key: change(state[key])})


# What is wrong, and a regular expression for the message.
SPOILT = {
    "V is missing": (lambda s: s["matrices"]["blend"].pop("V"), "no tensor V of 'blend'"),
    "V is a list": (lambda s: s["matrices"]["blend"].update(V=[1.0]), "no tensor V of 'blend'"),
    "a matrix is missing": (lambda s: s["matrices"].pop("blend"), "1 are on one side only, such as 'blend'"),
    "U is of whole numbers": (
        lambda s: s["matrices"]["blend"].update(U=s["matrices"]["blend"]["U"].long()),
        "U of 'blend' is of torch.int64",
    ),
    "U is transposed": (
        lambda s: s["matrices"]["up.weight"].update(U=s["matrices"]["up.weight"]["U"].T.clone()),
        r"U of 'up.weight' is \(4, 53\), this model's would be \(53, 4\)",
    ),
    "sigma has a NaN": (lambda s: s["matrices"]["blend"]["sigma"].fill_(NAN), "sigma of 'blend' holds a NaN"),
    "the steps are missing": (without("steps"), "lacks its number of steps"),
    "the matrices are missing": (without("matrices"), "lacks its matrices"),
    "it is torch's": (
        lambda s: (s.clear(), s.update(state={}, param_groups=[])),
        "of a torch.optim optimizer such as AdamW",
    ),
}


def spoil(path, how, zero: bool) -> None:
    state = torch.load(path, weights_only=False)
    ours = state["optimizer_state_dict" if zero else "optimizer"]["mofasgd"]
    how(ours if "format" in ours else ours["matrices"])
    torch.save(state, path)
    body_files = checkpoints.files_of(path.parent, [path.name])
    manifest = checkpoints.read_manifest(path.parent)
    edit(path.parent / MANIFEST, files={**manifest["files"], **body_files})


def spoilt(stage: int, dtype: str) -> dict:
    with engine_for(config(stage, dtype=dtype)) as engine:
        train_step(engine, DATA[0])
        engine.save_checkpoint("saved", tag="whole")
    name = "mp_rank_00_model_states.pt"
    if stage:
        name = ("bf16_" if dtype == "bf16" else "") + "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    found = {}
    with engine_for(config(stage, dtype=dtype), model=toy(seed=1)) as engine:
        before = state_of(engine)
        for what, (how, _) in SPOILT.items():
            if dist.get_rank() == 0:
                shutil.rmtree("saved/hurt", ignore_errors=True)
                shutil.copytree("saved/whole", "saved/hurt")
                spoil(Path("saved/hurt") / name, how, bool(stage))
            dist.barrier()
            message = ""
            try:
                engine.load_checkpoint("saved", tag="hurt")
            except ValueError as error:
                message = str(error)
            found[what] = {"message": message, "untouched": equal(before, state_of(engine))}
            dist.barrier()
        # Straight into the matrices, as nothing but a script of the user's own does it.
        matrices = engine.basic_optimizer.matrices
        state = copy.deepcopy(matrices.state_dict())
        if dist.get_rank() == 0:
            del state["matrices"]["blend"]["V"]
        with pytest.raises(ValueError, match="V|another rank could not load") as refused:
            matrices.load_state_dict(state)
        return {"found": found, "direct": str(refused.value)}


@on_ranks(spoilt, {"stage": 0, "dtype": "fp32"}, {"stage": 0, "dtype": "bf16"}, {"stage": 1, "dtype": "fp32"},
          {"stage": 2, "dtype": "bf16"}, {"stage": 3, "dtype": "fp32"})  # fmt: skip
def test_a_state_that_is_none_is_named_on_every_rank_before_anything_is_loaded(ran):
    for what, (_, wanted) in SPOILT.items():
        messages = {result["found"][what]["message"] for result in ran.ranks}
        assert len(messages) == 1, (what, messages)
        assert re.search(wanted, messages.pop()), what
        assert all(result["found"][what]["untouched"] for result in ran.ranks), what
    assert "no tensor V of 'blend'" in ran.ranks[0]["direct"]
    assert "another rank could not load" in ran.ranks[1]["direct"]


def crossed(stage: int, first: str) -> dict:
    """The checkpoint of one optimizer in an engine with the other: with its state, and the weights alone."""
    pair = [config(stage), config(stage)]
    pair[first == "MoFaSGD"]["optimizer"] = ADAMW
    with engine_for(pair[0]) as engine:
        train_step(engine, DATA[0])
        engine.save_checkpoint("saved", tag="t")
        wanted = whole_weights(engine.module)
    result = {}
    with engine_for(pair[1], model=toy(seed=1)) as engine:
        before = whole_weights(engine.module)
        try:
            engine.load_checkpoint("saved", tag="t")
            result["message"] = ""
        except Exception as error:
            result["message"] = f"{type(error).__name__}: {error}"
        result["untouched"] = equal(before, whole_weights(engine.module))
    with engine_for(pair[1], model=toy(seed=1)) as engine:
        engine.load_checkpoint("saved", tag="t", load_optimizer_states=False)
        result["weights"] = equal(wanted, whole_weights(engine.module))
    return result


@on_ranks(crossed, stage=[0, 1, 2, 3], first=["AdamW"])
def test_adamws_checkpoint_is_refused_and_its_weights_are_taken(ran):
    for result in ran.ranks:
        assert "another optimizer wrote it" in result["message"]
        assert result["untouched"] and result["weights"]


@on_ranks(crossed, stage=[0, 1, 2, 3], first=["MoFaSGD"])
def test_adamw_refuses_this_packages_checkpoint_and_takes_its_weights(ran):
    for result in ran.ranks:
        assert "saved by MoFaSGD" in result["message"], result["message"]
        assert result["untouched"] and result["weights"]


def module_only(stage: int, dtype: str) -> dict:
    """``load_module_only``, of a tag that is not the latest, into an engine that has trained."""
    masters = {"master_weights": dtype == "bf16"}
    with engine_for(config(stage, dtype=dtype, options=masters)) as engine:
        train_step(engine, DATA[0])
        engine.save_checkpoint("saved", tag="t")
        wanted = whole_weights(engine.module)
        train_step(engine, DATA[1])
        engine.save_checkpoint("saved", tag="later")
    results = {}
    for how in ({"load_module_only": True}, {"load_optimizer_states": False}):
        with engine_for(config(stage, dtype=dtype, options=masters), model=toy(seed=1)) as engine:
            train_step(engine, DATA[2])
            engine.load_checkpoint("saved", tag="t", **how)
            loaded = whole_weights(engine.module)
            for group in engine.optimizer.param_groups:
                group["lr"] = 0.0
            train_step(engine, DATA[2])  # which writes the weights from the masters, where there are some
            after = whole_weights(engine.module)
            results[min(how)] = {"weights": equal(wanted, loaded), "after": equal(wanted, after)}
    return results


@on_ranks(module_only, {"stage": 0, "dtype": "fp32"}, {"stage": 2, "dtype": "bf16"}, {"stage": 3, "dtype": "fp32"},
          {"stage": 3, "dtype": "bf16"})  # fmt: skip
def test_the_weights_alone_are_all_of_them_and_of_the_tag(ran):
    for result in ran.ranks:
        for how, found in result.items():
            assert found == {"weights": True, "after": True}, how
