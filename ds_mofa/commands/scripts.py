"""``ds-mofa train``, ``predict`` and ``verify``: the scripts of launch/ and profiling/, which are no part of the package.

Each is run as from a clone: by its path, with the folder that has launch/ and profiling/ before all others. A value of
``--deepspeed``, ``--model_config`` and the like may be the name of a config that comes with the package. Where a launcher has
started the ranks, as `torchrun -m ds_mofa train` has, train is one of them; else it starts them itself.
"""

import os
import runpy
import sys
from pathlib import Path

import torch

from ds_mofa.commands import ranks, shipped

__all__ = ["predict", "train", "verify"]

_FILES = ("--deepspeed", "--model_config")


def predict(argv: list[str]) -> None:
    _run(_script("profiling/predict.py"), _with_shipped(argv))


def verify(argv: list[str]) -> None:
    _run(_script("profiling/verify_claim.py"), _with_shipped(argv))


def train(argv: list[str]) -> int | None:
    words, gpus = _gpus(_with_shipped(argv))
    script = _script("launch/train.py")
    if {"-h", "--help", "--help_all"} & set(words):
        _run(script, words)
        return None
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        if gpus is not None:
            sys.exit("ds-mofa train: error: --gpus, and a launcher that has started the ranks: leave one of them out")
        _run(script, words)
        return None
    count = gpus or max(1, torch.cuda.device_count())
    by_deepspeed = any(word.split("=")[0] == "--deepspeed" for word in words)
    by_fsdp = any(word.split("=")[0] in ("--fsdp", "--fsdp_config") for word in words)
    if count == 1 and not by_deepspeed and not by_fsdp:
        if gpus is not None:  # Hugging Face's Trainer takes all that it sees
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        _run(script, words)
        return None
    return ranks.run([sys.executable, str(script), *words], count)


def _script(name: str) -> Path:
    return shipped.ROOT / name


def _run(script: Path, words: list[str]) -> None:
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def _gpus(words: list[str]) -> tuple[list[str], int | None]:
    """The words without ``--gpus N``, and N."""
    rest, gpus, waiting = [], None, False
    for word in words:
        if waiting or word.startswith("--gpus="):
            text = word.removeprefix("--gpus=")
            if not text.isdecimal() or int(text) < 1:
                sys.exit(f"ds-mofa train: error: --gpus {text}: it is how many, 1 or more")
            gpus, waiting = int(text), False
        elif word == "--gpus":
            waiting = True
        else:
            rest.append(word)
    if waiting:
        sys.exit("ds-mofa train: error: --gpus without a number")
    return rest, gpus


def _with_shipped(words: list[str]) -> list[str]:
    found = []
    for before, word in zip(["", *words], words):
        name, equals, value = word.partition("=")
        if before in _FILES:
            word = shipped.path_of(word) or word
        elif name in _FILES and equals:
            word = f"{name}={shipped.path_of(value) or value}"
        found.append(word)
    return found
