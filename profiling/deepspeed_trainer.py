"""DeepSpeed's loop: ``deepspeed.initialize`` with a ZeRO stage."""

import os
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig

from ds_mofa.profiler.setting import RunSetting
from profiling.trainers import build_model, optimizer_params

__all__ = ["DeepSpeedTrainer"]


class DeepSpeedTrainer:
    """``deepspeed.initialize`` with a ZeRO stage."""

    optimizer = None

    def __init__(self, setting: RunSetting, device: torch.device):
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        config = engine_config(setting, device)
        # While it lives, transformers builds models under zero.Init in stage 3.
        self._hf_config = HfDeepSpeedConfig(config)
        self.model = build_model(setting, device)
        self.config = self.model.config
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        if setting.leaf:
            config["zero_optimization"]["leaf_module"] = {"classes": list(self.model._no_split_modules)}
        parameters = self.model.parameters()
        self.engine, *_ = deepspeed.initialize(model=self.model, model_parameters=parameters, config=config)
        self.micro_batches, self._count = setting.micro_batches, 0

    @property
    def skipped(self) -> int:
        return int(self.engine.skipped_steps)

    def accumulate_over(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.engine.set_train_batch_size(micro_batches * self.engine.dp_world_size)

    def accumulate(self, ids: Tensor) -> Tensor:
        if self._count:
            self.engine.step()  # counts the micro-batch before; the last one's call is the optimizer's
        self._count = (self._count + 1) % self.micro_batches
        self.engine.set_gradient_accumulation_boundary(self._count == 0)
        loss = self.engine(input_ids=ids, labels=ids).loss
        self.engine.backward(loss)
        return loss.detach()

    def step(self) -> None:
        self.engine.step()

    def versions(self) -> dict[str, Any]:
        return {"deepspeed": deepspeed.__version__, "world_size": int(os.environ.get("WORLD_SIZE", 1))}


def engine_config(setting: RunSetting, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's JSON of a setting."""
    pure = setting.states == "bf16"
    on_host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    offload = {"offload_optimizer": on_host} if setting.offload else {}
    if setting.offload == "param":
        offload["offload_param"] = on_host
    # On the host it is DeepSpeed's own AdamW; else torch's, which need not be compiled, or ours of 8-bit states.
    torchs = not offload and setting.option("adamw_states") != "8bit"
    adamw = {"torch_adam": True, **({"fused": True} if device.type == "cuda" else {})} if torchs else {}
    return {
        "train_micro_batch_size_per_gpu": setting.micro_batch,
        "gradient_accumulation_steps": setting.micro_batches,
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": pure, "bf16_optimizer_states": pure},
        "zero_optimization": {
            "stage": setting.zero,
            "overlap_comm": setting.overlap,
            "contiguous_gradients": setting.contiguous,
            "reduce_bucket_size": setting.bucket,
            "allgather_bucket_size": 200_000_000,
            "stage3_prefetch_bucket_size": setting.prefetch,
            "stage3_param_persistence_threshold": 100_000,
            **offload,
        },
        "optimizer": {"type": setting.optimizer, "params": {**optimizer_params(setting), **adamw}},
        "steps_per_print": 10**9,
    }
