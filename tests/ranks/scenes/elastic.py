"""A run that is saved after three steps, and engines that go on from its files: other ranks, stages, factors."""

import argparse
from pathlib import Path

import torch
import toys
from comparing import equal
from deepspeed import comm as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_optimizer_state
from torch import nn
from toys import batches
from training import config, engine_for, toy, train_step, whole_momenta, whole_weights

from ds_mofa.backends.deepspeed.universal import convert

DATA = batches(6)
SCHEDULE = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 8, "warmup_max_lr": 2e-3}}
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def settings_for(stage: int, dtype: str = "fp32", **rest) -> dict:
    return config(stage, dtype=dtype, scheduler=SCHEDULE, gradient_clipping=0.5, **rest)


def groups_of(model: nn.Module) -> list[dict]:
    """Two groups of AdamW's, which must keep their own weight decay."""
    trained = [param for param in model.parameters() if param.requires_grad]
    thin = [param for param in trained if param.dim() < 2]
    thick = [param for param in trained if param.dim() >= 2]
    return [{"params": thick, "weight_decay": 0.3}, {"params": thin, "weight_decay": 0.0}]


def buffered(seed: int, kind: str = "Toy") -> nn.Module:
    """A toy, with a buffer that a checkpoint holds too."""
    model = toy(getattr(toys, kind), seed=seed)
    model.register_buffer("seen", torch.tensor([7 + seed, 1 << 30]))
    return model


def end_of(engine) -> dict:
    return {
        "losses": [train_step(engine, batch) for batch in DATA[3:]],
        "lr": [group["lr"] for group in engine.basic_optimizer.param_groups],
        "weights": whole_weights(engine.module),
        "momenta": whole_momenta(engine),
    }


def state_of(engine) -> dict:
    """All that a resumed run needs, whole."""
    if engine.zero_optimization_stage() in (1, 2):  # DeepSpeed links the moments of a second group too early
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    names = [name for name, param in engine.module.named_parameters() if param.requires_grad]
    adamw = {
        f"{name} {key}": safe_get_full_optimizer_state(engine.module.get_parameter(name), key).cpu().flatten().clone()
        for name in names
        if name not in engine.module.MATRICES and engine.zero_optimization_stage() > 0
        for key in ("exp_avg", "exp_avg_sq")
    }
    return {
        "weights": whole_weights(engine.module),
        "buffer": engine.module.seen.clone(),
        "factors": engine.basic_optimizer.matrices.state_dict(),
        "adamw": adamw,
        "decay": [group["weight_decay"] for group in engine.basic_optimizer.param_groups],
        "step": sorted({int(s["step"]) for s in engine.basic_optimizer.adamw.state.values() if "step" in s}),
    }


def masters_of(engine) -> dict:
    """This rank's part."""
    return {name: part.flatten() for name, part in engine.basic_optimizer.matrices.masters.state_dict().items()}


def saved(stage: int, dtype: str = "fp32", universal: bool = True, kind: str = "Toy", **rest) -> dict:
    """Six steps, saved after three, and the universal checkpoint of that."""
    model = buffered(seed=0, kind=kind)
    with engine_for(settings_for(stage, dtype, **rest), model=model, groups=groups_of(model)) as engine:
        for batch in DATA[:3]:
            train_step(engine, batch)
        engine.save_checkpoint("saved", tag="third")
        state, masters = state_of(engine), masters_of(engine)
        if universal and dist.get_rank() == 0:
            convert(Path("saved/third"), Path("saved/third_universal"), workers=1)
        dist.barrier()
        return {"state": state, "masters": masters, "end": end_of(engine)}


def resumed(
    stage: int,
    before: str,
    dtype: str = "fp32",
    universal: bool = True,
    tag: str | None = None,
    kind: str = "Toy",
    **rest,
) -> dict:
    """The other three steps, by an engine that starts from other weights."""
    model = buffered(seed=1, kind=kind)
    chosen = settings_for(stage, dtype, **rest, **(UNIVERSAL if universal else {}))
    with engine_for(chosen, model=model, groups=groups_of(model)) as engine:
        path, _ = engine.load_checkpoint(f"{before}/saved", tag=tag)
        assert path is not None
        state, masters = state_of(engine), masters_of(engine)
        return {"state": state, "masters": masters, "end": end_of(engine)}


def raw_conversion(before: str) -> None:
    if dist.get_rank() == 0:
        folders = {"input_folder": f"{before}/saved/third", "output_folder": str(Path("saved/raw").absolute())}
        workers = {"num_extract_workers": 1, "num_merge_workers": 1}
        switches = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
        ds_to_universal.main(argparse.Namespace(**folders, **workers, **switches))
    dist.barrier()


def refused(before: str, stage: int, tag: str = "third", load: dict | None = None, raw: bool = False, **rest) -> dict:
    """The error of loading, and what the engine is then."""
    model = buffered(seed=1)
    if raw:
        raw_conversion(before)
        before, tag = ".", "raw"
    with engine_for(settings_for(stage, **rest), model=model, groups=groups_of(model)) as engine:
        untouched = whole_weights(engine.module)
        message = ""
        try:
            engine.load_checkpoint(f"{before}/saved", tag=tag, **(load or {}))
        except ValueError as error:
            message = str(error)
        same = equal(untouched, whole_weights(engine.module)) and engine.basic_optimizer.matrices.steps == 0
        return {"message": message, "untouched": same}


def assert_continued(ran, tolerance: float = 1e-5) -> None:
    """Everything is loaded bit for bit, and the curve goes on to rounding."""
    was, wanted = ran.before.ranks[0]["state"], ran.before.ranks[0]["end"]
    for rank, result in enumerate(ran.ranks):
        now, end = result["state"], result["end"]
        for what in ("weights", "buffer", "decay", "step") + (("factors",) if rank == 0 else ()):
            assert equal(now[what], was[what]), what
        if now["adamw"] and was["adamw"]:
            assert equal(now["adamw"], was["adamw"])
        assert end["lr"] == wanted["lr"]
        for x, y in zip(end["losses"], wanted["losses"], strict=True):
            assert abs(x - y) < tolerance * y, (end["losses"], wanted["losses"])
        for kind in ("weights", "momenta") if tolerance < 1e-3 else ():
            for name, value in end[kind].items():
                assert (value - wanted[kind][name]).norm() < tolerance * wanted[kind][name].norm(), name
    assert not equal(was["weights"], ran.ranks[0]["end"]["weights"])
