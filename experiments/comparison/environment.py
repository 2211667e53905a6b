"""What a run was made by: hardware, versions, and the code of the optimizers, which has no version while it changes."""

import hashlib
from pathlib import Path

import torch

import ds_mofa
from ds_mofa.profiler.report import environment
from experiments import baselines

__all__ = ["describe"]


def describe(device: torch.device) -> dict[str, str]:
    """Hardware and versions, each as text."""
    cuda = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"device": hardware, **environment(), "code of ds_mofa": _code()}


def _code() -> str:
    """Of the package, and of the baselines beside it."""
    digest = hashlib.sha256()
    for package in (ds_mofa, baselines):
        root = Path(package.__file__).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
