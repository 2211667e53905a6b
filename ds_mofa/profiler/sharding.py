"""How a run under FSDP2 cuts its model: the same in a run that is measured and in one that is predicted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from ds_mofa.profiler.setting import RunSetting

__all__ = ["mesh_of", "shard"]


def mesh_of(setting: RunSetting, device: str) -> DeviceMesh:
    """All ranks, on devices of this type; with replicas, those that hold the same shard are a column."""
    if setting.replicas == 1:
        return init_device_mesh(device, (setting.gpus,), mesh_dim_names=("shard",))
    shape = (setting.replicas, setting.shards)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    model: nn.Module, mesh: DeviceMesh, setting: RunSetting, prepare: Callable[[nn.Module], None] = lambda module: None
) -> None:
    """``fully_shard`` of each decoder layer, then of the model with what is left: embedding, final norm and head.

    Args:
        model: of transformers, whole.
        mesh: of :func:`mesh_of`.
        prepare: called with each of these modules right before it is cut.
    """
    options: dict[str, Any] = {"mesh": mesh}
    if setting.weights == "fp32":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if setting.offload == "param" and mesh.device_type != "cpu":  # on a CPU there is nowhere to go
        options["offload_policy"] = CPUOffloadPolicy()
    causal: Any = model  # with Hugging Face's attributes
    classes = tuple(causal._no_split_modules or ())
    for layer in [module for module in model.modules() if type(module).__name__ in classes]:
        prepare(layer)
        fully_shard(layer, reshard_after_forward=setting.reshard and not setting.gathered, **options)
    prepare(model)
    whole = fully_shard(model, **options)
    if setting.gathered:
        whole.set_reshard_after_backward(False)
