"""Make a checkpoint loadable on any number of ranks and at ZeRO stage 1, 2 or 3: ``python -m ds_mofa.to_universal``."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ds_mofa.backends.deepspeed import torch_form
from ds_mofa.backends.deepspeed.checkpoints import CheckpointError, load
from ds_mofa.backends.deepspeed.universal import convert

# What Accelerate and the HF Trainer write under FSDP2: folders of torch.distributed.checkpoint, or whole files.
_MODELS = ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")
_OPTIMIZERS = ("optimizer_0", "optimizer.bin")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ds_mofa.to_universal",
        description="Make a checkpoint of MoFaSGD loadable on any number of ranks and at ZeRO stage 1, 2 or 3; or, from such a "
        "one, what a run without DeepSpeed loads.",
        epilog='The run that loads it needs "checkpoint": {"load_universal": true} in its DeepSpeed config.',
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input_folder", type=Path, help="of one tag of DeepSpeed's, such as out/global_step100")
    source.add_argument(
        "--from_torch",
        type=Path,
        help="a run without DeepSpeed: a file of torch.save or a folder of torch.distributed.checkpoint that holds a model and "
        "an optim; or a folder that Accelerate or the Trainer has saved under FSDP2",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output_folder", type=Path, help="to write; must not exist")
    target.add_argument("--to_torch", type=Path, help="a file to write, from an --input_folder that is universal")
    parser.add_argument("--workers", type=int, default=4, help="processes (4)")
    parser.add_argument("--trust", action="store_true", help="run what its pickles hold, if it is your own")
    arguments = parser.parse_args()
    try:
        if arguments.to_torch is not None:
            if arguments.input_folder is None:
                parser.error("--to_torch is made from --input_folder")
            torch.save(torch_form.from_universal(arguments.input_folder, arguments.trust), arguments.to_torch)
        elif arguments.from_torch is not None:
            torch_form.to_universal(read_torch(arguments.from_torch, arguments.trust), arguments.output_folder)
        else:
            convert(arguments.input_folder, arguments.output_folder, arguments.workers, arguments.trust)
    except CheckpointError as error:
        parser.exit(2, f"error: {error}\n")


def read_torch(source: Path, trusted: bool = False) -> dict[str, Any]:
    """What a run without DeepSpeed has saved, as :mod:`ds_mofa.backends.deepspeed.torch_form` takes it.

    Raises:
        CheckpointError: there is no such file or folder, or it is none of these.
    """
    if not source.exists():
        raise CheckpointError(f"{source}: there is no such file or folder")
    if source.is_file() or (source / ".metadata").is_file():
        return _joined(_content(source, trusted))
    parts = [
        next((source / name for name in names if (source / name).exists()), None) for names in (_MODELS, _OPTIMIZERS)
    ]
    if None in parts:
        raise CheckpointError(
            f"{source} is no folder of torch.distributed.checkpoint, and none that Accelerate has saved under FSDP2, with "
            f"{_MODELS[0]} and {_OPTIMIZERS[0]}"
        )
    model, optim = (_content(part, trusted) for part in parts if part is not None)
    scheduler = source / "scheduler.pt"
    state = {"model": model.get("model", model), "optim": optim.get("optimizer", optim)}
    return state | ({"lr_scheduler": load(scheduler, trusted=trusted)} if scheduler.is_file() else {})


def _content(source: Path, trusted: bool) -> dict[str, Any]:
    if source.is_file():
        return load(source, trusted=trusted)
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(source, Path(folder) / "whole.pt")
        return load(Path(folder) / "whole.pt", mmap=False, trusted=trusted)


def _joined(state: dict[str, Any]) -> dict[str, Any]:
    """By the names that are used here."""
    return {"optim" if key == "optimizer" else key: value for key, value in state.items()}


if __name__ == "__main__":
    main()
