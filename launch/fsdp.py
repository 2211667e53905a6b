"""FSDP2 as Hugging Face's flags or an Accelerate config describe it: what is refused, and how its checkpoints are cut."""

import argparse
import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy

from launch.errors import UserError
from launch.json_files import parse, read_json

__all__ = ["FULL", "SHARDED", "check_fsdp", "describe_fsdp", "state_dict_type", "written_as"]

FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"

# What Hugging Face reads of an fsdp_config for FSDP2; it passes over any other key in silence.
_KEYS = (
    "version", "reshard_after_forward", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params",
    "state_dict_type", "cpu_offload", "cpu_ram_efficient_loading", "activation_checkpointing",
)  # fmt: skip
_OF_FSDP1 = "backward_prefetch", "forward_prefetch", "limit_all_gathers", "sync_module_states", "use_orig_params"


def check_fsdp(argv: Sequence[str], wanted: bool) -> None:
    """Refuse what Hugging Face and Accelerate would pass over in silence, or trip over once the model is loaded.

    Args:
        wanted: FSDP2 is this run's engine.

    Raises:
        UserError: which of the flags, of the config's keys or of the launcher's settings cannot be, and the way out.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--fsdp", nargs="?", const="true")
    parser.add_argument("--fsdp_config")
    for flag in ("--use_cpu", "--gradient_checkpointing"):
        parser.add_argument(flag, nargs="?", const="true", default="false")
    given = parser.parse_known_args(argv)[0]
    if given.fsdp_config is not None and not given.fsdp:
        raise UserError("--fsdp_config: without --fsdp nobody reads it. Add --fsdp.")
    if not wanted:
        return
    config = _config(given.fsdp_config) if given.fsdp else _config_of_accelerate()
    if str(config.get("version", 2)) != "2":
        raise UserError(
            f"FSDP version {config['version']}: ds_mofa knows FSDP2. Write fsdp_version: 2 (as configs/fsdp2.yaml does)."
        )
    if _is_true(given.gradient_checkpointing) and _is_true(config.get("activation_checkpointing")):
        raise UserError("--gradient_checkpointing: FSDP's activation_checkpointing is on already. Keep one of them.")
    offloads = _is_true(config.get("cpu_offload")) or "offload" in str(given.fsdp).split()
    if not torch.cuda.is_available():
        if offloads:
            raise UserError("cpu_offload: it is for the weights of a GPU, and there is none. Leave it out.")
    elif _is_true(given.use_cpu):
        raise UserError(
            "--fsdp with --use_cpu: FSDP2 would take the GPUs that there are. Hide them: CUDA_VISIBLE_DEVICES= in front."
        )


def _config(text: str | None) -> dict[str, Any]:
    """What ``--fsdp_config`` says, by the keys without their prefix."""
    if text is None:
        return {}
    if text.lstrip().startswith("{"):
        content = parse(text, "--fsdp_config")
    else:
        content = read_json(text, "the --fsdp_config file")
    config = {str(key).removeprefix("fsdp_"): value for key, value in content.items()}
    for key in config:
        if key.startswith("xla"):
            raise UserError(f"--fsdp_config: {key!r} is for TPUs. Leave it out.")
        if key in _OF_FSDP1:
            raise UserError(f"--fsdp_config: {key!r} is of FSDP1, and FSDP2 has no such setting. Leave it out.")
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            raise UserError(
                f"--fsdp_config: unknown key {key!r}, which nobody would read"
                + (f"; did you mean {close[0]!r}?" if close else f". There are {', '.join(_KEYS)}.")
            )
    return config


def _config_of_accelerate() -> dict[str, Any]:
    """Of an FSDP config of ``accelerate launch``, which it hands on in the environment, what is asked about here."""
    read = {
        "version": "FSDP_VERSION",
        "cpu_offload": "FSDP_OFFLOAD_PARAMS",
        "activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
    }
    return {"version": "1"} | {key: os.environ[name] for key, name in read.items() if name in os.environ}


def _is_true(value: object) -> bool:
    return str(value).lower() in ("true", "1")


def describe_fsdp(settings: dict[str, Any] | None, device: torch.device) -> str:
    """What decides memory and checkpoints, in words.

    Args:
        settings: Hugging Face's, for Accelerate's plugin; None where the launcher's are in the environment.
    """
    plugin = FullyShardedDataParallelPlugin(**(settings or {}))
    kept = "resharded after forward" if plugin.reshard_after_forward else "gathered weights kept for backward"
    parts = ["CPU ranks"] if device.type == "cpu" else []
    parts += [kept, f"checkpoints {plugin.state_dict_type.name}"]
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        parts.append("weights in host memory")
    if plugin.activation_checkpointing:
        parts.append("activation checkpointing")
    return ", ".join(parts)


def written_as(checkpoint: str | Path) -> str | None:
    """The state-dict type of an FSDP2 checkpoint; None of another engine's."""
    folder = Path(checkpoint)
    if (folder / "pytorch_model_fsdp_0").is_dir():
        return SHARDED
    return FULL if (folder / "pytorch_model_fsdp.bin").is_file() else None


@contextmanager
def state_dict_type(plugin: FullyShardedDataParallelPlugin, name: str) -> Iterator[None]:
    """Within: states are cut as ``name`` says, ``FULL`` or ``SHARDED``."""
    settings = "state_dict_type", "state_dict_config", "optim_state_dict_config"
    before = {key: getattr(plugin, key) for key in settings}
    # The plugin keeps a config that it has, also when it is another type's.
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type(name)
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(plugin, key, value)
