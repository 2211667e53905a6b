"""What profiling's commands measure: a model with random weights, and a loop that trains it with or without DeepSpeed."""

import json
import os
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.liger import apply_liger_kernel

from ds_mofa.optimizers.registry import OPTIMIZERS
from ds_mofa.profiler.setting import RunSetting, SettingError

__all__ = ["Trainer", "check_measurable", "make_trainer"]

# What a process takes of a GPU beyond what PyTorch's allocator will ever show, once its libraries have loaded.
_LIBRARIES = 1.7e9  # bytes, seen on an H200: NCCL, cuBLAS's workspaces, the kernels of Triton and PyTorch


class Trainer(Protocol):
    """A model and a loop that trains it.

    Attributes:
        model: what is called.
        config: its shape.
        parameters: how many it has.
        optimizer: what steps; None where an engine has it.
        engine: DeepSpeed's; None in a plain loop.
    """

    model: nn.Module
    config: PretrainedConfig
    parameters: int
    optimizer: Any
    engine: Any

    def accumulate_over(self, micro_batches: int) -> None: ...

    def accumulate(self, ids: Tensor) -> Tensor:
        """Forward and backward of one micro-batch, (sequences, tokens); its loss."""

    def step(self) -> None: ...

    def versions(self) -> dict[str, Any]:
        """Of what the loop brings in, for a result row."""


def make_trainer(setting: RunSetting, device: torch.device) -> Trainer:
    """The loop that the setting names, on a model of its shape.

    Raises:
        SettingError: a run that can be predicted, and that nothing here trains.
    """
    if setting.card is not None:
        pretend_to_be(setting.card * 2**30, device)
    check_measurable(setting)
    if setting.zero is not None:
        return DeepSpeedTrainer(setting, device)
    return LoRATrainer(setting, device) if setting.optimizer == "LoRA" else TorchTrainer(setting, device)


def check_measurable(setting: RunSetting) -> None:
    """
    Raises:
        SettingError: a run that can be predicted, and that nothing here trains.
    """
    plain = setting.zero is None
    if setting.entry is None and setting.optimizer not in ("AdamW", *(["LoRA"] if plain else [])):
        able = ", ".join(["AdamW", *OPTIMIZERS, "and without ZeRO LoRA"])
        raise SettingError(f"{setting.run} cannot be measured, only predicted: measured can be {able}")


def pretend_to_be(size: float, device: torch.device) -> None:
    """Let the allocator run out of memory where a GPU of ``size`` bytes would: contexts and libraries take their part."""
    free, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction((size - (total - free) - _LIBRARIES) / total, device)


def build_model(setting: RunSetting, device: torch.device) -> nn.Module:
    config = AutoConfig.for_model(**json.loads(Path(setting.model_config).read_text()))
    config.use_cache = False
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if setting.liger:
        apply_liger_kernel(model, {"fused_linear_cross_entropy": False} if setting.option("fused_head") else None)
    if setting.embed == "frozen":
        model.get_input_embeddings().weight.requires_grad_(False)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def optimizer_params(setting: RunSetting) -> dict[str, Any]:
    """With rates at which random weights learn: half of the default one."""
    if setting.entry is None:
        return {"lr": 1e-5}
    return {"lr": setting.entry.learning_rate / 2, "adamw_lr": 1e-5, **setting.params(include=("lm_head",))}


class TorchTrainer:
    """A plain loop on one GPU: weights, gradients and AdamW's states in bf16."""

    engine = None

    def __init__(self, setting: RunSetting, device: torch.device):
        self.model, self.micro_batches = build_model(setting, device), setting.micro_batches
        self.config, self.parameters = self.model.config, sum(p.numel() for p in self.model.parameters())
        params = optimizer_params(setting)
        self.optimizer: torch.optim.Optimizer
        if setting.entry is not None:
            self.optimizer = setting.entry.optimizer(self.model, **params)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **params, fused=device.type == "cuda")

    def accumulate_over(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches

    def accumulate(self, ids: Tensor) -> Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        (loss / self.micro_batches).backward()
        return loss.detach()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def versions(self) -> dict[str, Any]:
        return {}


class LoRATrainer(TorchTrainer):
    """The same loop with peft's LoRA on every linear of the layers, adapters and AdamW's states in bf16."""

    def __init__(self, setting: RunSetting, device: torch.device):
        from peft import LoraConfig, get_peft_model  # an optional package

        base, self.micro_batches = build_model(setting, device), setting.micro_batches
        config = LoraConfig(r=setting.rank, target_modules="all-linear", lora_dropout=0.0)
        # peft's default makes the adapters fp32, and with them a second, fp32 copy of every input.
        self.model = get_peft_model(base, config, autocast_adapter_dtype=False)
        self.config, self.parameters = base.config, sum(p.numel() for p in self.model.parameters())
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")


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
