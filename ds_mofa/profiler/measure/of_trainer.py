"""What run HF's ``Trainer`` (and TRL's) is, for a prediction to stand beside its memory."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ds_mofa
from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.registry import find
from ds_mofa.profiler.measure.fully_sharded import parameters
from ds_mofa.profiler.measure.inventory import unwrap_optimizer
from ds_mofa.profiler.setting import RunSetting, SettingError

__all__ = ["predict_beside", "setting_of"]

_SECONDS = 300  # for a prediction; an 8B takes a few


def setting_of(
    args: Any, model: nn.Module, optimizer: Any, path: Path, shape: tuple[int, int], loss: str
) -> RunSetting:
    """The run, whose model's shape is written to ``path``.

    Args:
        args: TrainingArguments.
        model: without wrappers.
        optimizer: as the trainer has it.
        shape: (sequences, tokens) of the largest forward.
        loss: see :attr:`RunSetting.loss`.

    Raises:
        SettingError: what the predictor does not know.
    """
    trained = list(parameters(model))
    if any(not p.requires_grad for p in trained):
        raise SettingError("some parameters are frozen")
    if args.fsdp:
        raise SettingError("under FSDP the prediction needs the mesh: ds-mofa predict --backend fsdp2")
    if any(p.dtype != torch.bfloat16 for p in trained):
        raise SettingError("the weights are not in bf16, which predictions take them to be")
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[operator,union-attr]
    path.write_text(json.dumps(config, default=str), encoding="utf-8")
    fields: dict[str, Any] = {
        "gpus": args.world_size, "micro_batch": shape[0], "seq": shape[1], "micro_batches": args.gradient_accumulation_steps,
        "checkpointing": args.gradient_checkpointing, "liger": args.use_liger_kernel, "loss": loss,
    }  # fmt: skip
    return RunSetting.of(str(path), **fields, **_optimizer(optimizer), **_backend(args))


def predict_beside(make: Callable[[], RunSetting], output: Path) -> dict[str, Any]:
    """A prediction, or ``{"error": why there is none}``, by a process without devices and ranks, within five minutes."""
    try:
        setting = make()
        environment = {
            name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        }
        root = str(Path(ds_mofa.__file__).resolve().parents[1])
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "ds_mofa.profiler.predict", str(setting), str(output)]
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=True)
        return json.loads(output.read_text(encoding="utf-8"))
    except (SettingError, OSError, subprocess.SubprocessError, ValueError) as error:
        return {"error": str(error)}


def _optimizer(optimizer: Any) -> dict[str, Any]:
    inner = unwrap_optimizer(optimizer)
    mofa = getattr(inner, "mofa", inner)
    if isinstance(mofa, MatrixOptimizer):
        name = type(mofa).__name__
        entry = find(name)
        if entry is None:
            raise SettingError(f"{name} is no optimizer that predictions know")
        options, plain = mofa.options, entry.options()
        names = [field.name for field in dataclasses.fields(plain) if field.name != "lr"]
        changed = {name: getattr(options, name) for name in names if getattr(options, name) != getattr(plain, name)}
        return {"optimizer": name, "rank": options.rank} | {name: v for name, v in changed.items() if name != "rank"}
    base = getattr(inner, "optimizer", inner)
    if "adamw" not in type(base).__name__.lower():
        raise SettingError(f"{type(base).__name__} is no optimizer that predictions know")
    return {"optimizer": "AdamW"}


def _backend(args: Any) -> dict[str, Any]:
    config = getattr(getattr(args, "hf_deepspeed_config", None), "config", None)
    if config is None:
        return {"backend": "torch" if args.world_size == 1 else "ddp"}
    zero = config.get("zero_optimization", {})
    offloaded = {part for part in ("optimizer", "param") if (zero.get(f"offload_{part}") or {}).get("device") == "cpu"}
    names = {
        "reduce_bucket_size": "bucket", "contiguous_gradients": "contiguous", "overlap_comm": "overlap",
        "stage3_prefetch_bucket_size": "prefetch",
    }  # fmt: skip
    said = {field: zero.get(name) for name, field in names.items()}  # numbers may be floats, 5e8, or "auto"
    given = {field: type(_default(field))(value) for field, value in said.items() if isinstance(value, int | float)}
    pure = config.get("bf16", {}).get("bf16_optimizer_states") is True
    offload = "param" if "param" in offloaded else "optimizer" if offloaded else None
    states = {"states": "bf16"} if pure else {}
    return {"zero": zero.get("stage", 0), "offload": offload, "leaf": "leaf_module" in zero, **states, **given}


def _default(field: str) -> Any:
    return getattr(RunSetting(), field)
