"""Accelerate and HF's Trainer without DeepSpeed: in one process, under DDP, and under FSDP2."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import transformers.trainer
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from scenes.huggingface import forget_accelerate

__all__ = ["WRAPPED", "accelerator_for", "in_folder", "restored", "trainer_of"]

WRAPPED = "LlamaDecoderLayer"


def accelerator_for(engine: str, precision: str = "no", **plugin: Any) -> accelerate.Accelerator:
    """As a script makes one.

    Args:
        engine: ``"fsdp2"``, ``"ddp"`` or ``"one"``.
        **plugin: settings of FSDP2.
    """
    if engine != "fsdp2":
        return accelerate.Accelerator(cpu=True, mixed_precision=precision)
    chosen = dict(auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[WRAPPED])
    chosen |= {"cpu_ram_efficient_loading": False, **plugin}
    sharding = FullyShardedDataParallelPlugin(fsdp_version=2, **chosen)
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=sharding, mixed_precision=precision)
    _tell(sharding, precision)
    return accelerator


def _tell(plugin: FullyShardedDataParallelPlugin, precision: str) -> None:
    """On a CPU Accelerate takes the plugin without a word and wraps in DDP: it knows FSDP on accelerators alone."""
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    if precision != "no":
        plugin.set_mixed_precision(precision)


class _Told(accelerate.Accelerator):
    def __init__(self, *args: Any, fsdp_plugin: Any = None, **kwargs: Any):
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        _tell(fsdp_plugin, self.mixed_precision)


@contextlib.contextmanager
def trainer_of(engine: str) -> Iterator[None]:
    """Within: the Trainer's Accelerate knows FSDP on a CPU."""
    with mock.patch.object(transformers.trainer, "Accelerator", _Told if engine == "fsdp2" else accelerate.Accelerator):
        yield


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Within, Accelerate is free to keep things for the process, in itself and in the environment; they go with the end."""
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            forget_accelerate()


def in_folder(folder: Path, train: Callable[..., dict]) -> Callable[..., dict]:
    """``train`` with its files in ``folder``, once for each of its arguments."""

    @functools.cache
    def trained(**settings: Any) -> dict:
        with contextlib.chdir(folder):
            return train(**settings)

    return trained
