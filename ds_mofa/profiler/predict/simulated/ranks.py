"""Ranks that only pretend: a process group whose collectives send nothing, for FSDP2 to shard a model of fake tensors."""

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from ds_mofa.backends import fsdp2
from ds_mofa.profiler.predict.simulated.errors import PredictionError
from ds_mofa.profiler.setting import RunSetting
from ds_mofa.profiler.sharding import mesh_of

__all__ = ["pretended_ranks"]


@contextlib.contextmanager
def pretended_ranks(setting: RunSetting) -> Iterator[DeviceMesh | None]:
    """Within: this process is the first of the setting's ranks, the fullest, and has their mesh; only where FSDP2 shards.

    Raises:
        PredictionError: the process has joined real ranks already.
    """
    if not setting.sharded:
        yield None
        return
    if dist.is_initialized():
        raise PredictionError(
            "a run under FSDP2 is predicted on ranks that only pretend, and this process has joined real ones: predict "
            "in a process of its own, or before torch.distributed.init_process_group"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore  # makes the backend known

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setting.gpus)
    # Which ranks there are, and which rows are this one's, is worked out with tensors that are no part of the model.
    names = ("_group_of", "compute_local_shape_and_global_offset")
    real: dict[str, Any] = {name: _on_real_tensors(getattr(fsdp2, name)) for name in names}
    try:
        with unittest.mock.patch.multiple(fsdp2, **real):
            yield mesh_of(setting, "cpu")
    finally:
        dist.destroy_process_group()


def _on_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    def real(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return real
