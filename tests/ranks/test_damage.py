"""A checkpoint that is not whole is refused, by the file's name, on every rank, before anything is loaded."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed import comm as dist
from launching import on_ranks
from test_resume import equal
from training import config, engine_for, toy, train_step, whole_weights
from toys import batches

from ds_mofa.deepspeed import checkpoints
from ds_mofa.deepspeed.checkpoints import MANIFEST, CheckpointError
from ds_mofa.deepspeed.universal import convert

DATA = batches(3)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, where: float = 0.5) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes) -> None:
    """A manifest that says something else, and is whole."""
    body = json.loads(path.read_text())
    del body["checksum"]
    path.write_text(json.dumps({**body, **changes, "checksum": checkpoints._checksum({**body, **changes})}))


def model_file(stage: int, rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"


def optim_file(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def damages(stage: int) -> dict:
    """What happens to which file."""
    last = 1 if stage == 3 else 0
    table = {
        "the model's is missing": (model_file(stage, last), Path.unlink),
        "the model's is truncated": (model_file(stage, last), truncate),
        "the model's has another bit": (model_file(stage, last), flip),
        "the manifest is missing": (MANIFEST, Path.unlink),
        "the manifest is truncated": (MANIFEST, truncate),
        "the manifest has another bit": (MANIFEST, flip),
        "the manifest is of a later format": (MANIFEST, lambda path: edit(path, format=99)),
        "the state is of a later format": (MANIFEST, lambda path: edit(path, state_format=99)),
    }
    for rank in (0, 1) if stage else ():
        table[f"rank {rank}'s state is missing"] = (optim_file(rank), Path.unlink)
        table[f"rank {rank}'s state is truncated"] = (optim_file(rank), truncate)
        for where in (0.0, 0.3, 0.7, 1.0):
            table[f"rank {rank}'s state has another bit at {where}"] = (optim_file(rank), lambda p, w=where: flip(p, w))
    return table


def damaged(stage: int) -> dict:
    """The error for each damage, and whether the engine is still what it was; at the end a whole one is loaded."""
    with engine_for(config(stage)) as engine:
        train_step(engine, DATA[0])
        engine.save_checkpoint("saved", tag="earlier")
        train_step(engine, DATA[1])
        engine.save_checkpoint("saved", tag="whole")
        wanted = (whole_weights(engine.module), engine.basic_optimizer.matrices.state_dict())
    found = {}
    with engine_for(config(stage), model=toy(seed=1)) as engine:
        before = whole_weights(engine.module)
        for what, (name, happens) in damages(stage).items():
            if dist.get_rank() == 0:
                shutil.rmtree("saved/hurt", ignore_errors=True)
                shutil.copytree("saved/whole", "saved/hurt")
                happens(Path("saved/hurt") / name)
            dist.barrier()
            message = ""
            try:
                engine.load_checkpoint("saved", tag="hurt")
            except CheckpointError as error:
                message = str(error)
            matrices, steps = engine.basic_optimizer.matrices, engine.global_steps
            same = equal(before, whole_weights(engine.module)) and not engine.basic_optimizer.adamw.state_dict()["state"]
            found[what] = {"message": message, "untouched": same and matrices.steps == 0 and steps == 0}
            dist.barrier()
        engine.load_checkpoint("saved", tag="whole")
        now = (whole_weights(engine.module), engine.basic_optimizer.matrices.state_dict())
        return {"found": found, "loaded": equal(list(now), list(wanted))}
