"""What an engine is, and a manifest of its checkpoint that says something else."""

import json
from pathlib import Path

import torch
from training import whole_weights

from ds_mofa.backends.deepspeed import checkpoints


def edit(path: Path, **changes) -> None:
    """A manifest that says something else, and is whole."""
    body = json.loads(path.read_text())
    del body["checksum"]
    path.write_text(json.dumps({**body, **changes, "checksum": checkpoints._checksum({**body, **changes})}))


def state_of(engine) -> dict:
    """Weights, AdamW's moments, factors, and the engine's own counter."""
    moments = [one for state in engine.basic_optimizer.adamw.state.values() for one in state.values()]
    return {
        "weights": whole_weights(engine.module),
        "moments": {str(i): one.clone() for i, one in enumerate(moments) if isinstance(one, torch.Tensor)},
        "factors": engine.basic_optimizer.matrices.state_dict(),
        "steps": engine.global_steps,
    }
