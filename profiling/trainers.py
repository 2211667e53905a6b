"""What profiling's commands measure: a model with random weights, and a loop that trains it with or without DeepSpeed."""

import json
import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import ds_mofa

OPTIONS = {
    "r", "explore", "capture", "states", "bucket", "contiguous", "overlap", "leaf", "prefetch", "checkpointing", "liger",
    "offload", "head", "head_loss", "embed", "card", "adamw",
}  # fmt: skip

# What a process takes of a GPU beyond what PyTorch's allocator will ever show, once its libraries have loaded.
_LIBRARIES = 1.7e9  # bytes, seen on an H200: NCCL, cuBLAS's workspaces, the kernels of Triton and PyTorch


def parse_run(run: str) -> tuple[str, str, dict[str, str]]:
    """Backend, optimizer and options of BACKEND:OPTIMIZER[:OPTION=VALUE...].

    Raises:
        ValueError: an option that no run has, which would otherwise go unread.
    """
    backend, optimizer, *options = run.split(":")
    options = dict(option.split("=") for option in options)
    if unknown := options.keys() - OPTIONS:
        raise ValueError(f"{run}: no option {', '.join(sorted(unknown))}; there are {', '.join(sorted(OPTIONS))}")
    return backend, optimizer, options


def make_trainer(run: str, path: str, micro_batches: int, device: torch.device):
    """The loop that ``run`` names, on a model of the shape in ``path``."""
    backend, optimizer, options = parse_run(run)
    if "card" in options:
        pretend_to_be(float(options["card"]) * 2**30, device)
    if backend == "torch" and optimizer.lower() == "lora":
        return LoRATrainer(path, options, micro_batches, device)
    if backend == "torch":
        return TorchTrainer(path, optimizer, options, micro_batches, device)
    return DeepSpeedTrainer(path, backend, optimizer, options, micro_batches, device)


def pretend_to_be(size: float, device: torch.device) -> None:
    """Let the allocator run out of memory where a GPU of ``size`` bytes would: contexts and libraries take their part."""
    free, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction((size - (total - free) - _LIBRARIES) / total, device)


def build_model(path: str, options: dict, device: torch.device):
    config = AutoConfig.for_model(**json.loads(Path(path).read_text()))
    config.use_cache = False
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if options.get("liger") == "1":
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(
            model, {"fused_linear_cross_entropy": False} if options.get("head_loss") == "fused" else None
        )
    if options.get("embed") == "frozen":
        model.get_input_embeddings().weight.requires_grad_(False)
    if options.get("checkpointing") == "1":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def optimizer_params(optimizer: str, options: dict) -> dict:
    if optimizer.lower() != "mofasgd":
        if options.get("head_loss") == "fused":
            raise ValueError(f"head_loss=fused is an option of MoFaSGD, not of {optimizer}")
        for name in ("adamw", "explore"):
            if name in options:
                raise ValueError(f"{name}={options[name]} is an option of MoFaSGD, not of {optimizer}")
        return {"lr": 1e-5}
    chosen = {"capture": options["capture"]} if "capture" in options else {}
    if options.get("head") == "matrix":
        chosen["include"] = ["lm_head"]
    if options.get("head_loss") == "fused":
        chosen["fused_head"] = True
    if "adamw" in options:
        chosen["adamw_states"] = options["adamw"]
    if "explore" in options:
        chosen["explore"] = int(options["explore"])
    return {"lr": 3e-3, "adamw_lr": 1e-5, "rank": int(options.get("r", 8)), **chosen}


class TorchTrainer:
    """A plain loop on one GPU: weights, gradients and AdamW's states in bf16."""

    def __init__(self, path: str, optimizer: str, options: dict, micro_batches: int, device: torch.device):
        self.model, self.micro_batches = build_model(path, options, device), micro_batches
        self.config, self.parameters = self.model.config, sum(p.numel() for p in self.model.parameters())
        params = optimizer_params(optimizer, options)
        if optimizer.lower() == "mofasgd":
            self.optimizer = ds_mofa.MoFaSGD(self.model, **params)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **params, fused=device.type == "cuda")

    def accumulate_over(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches

    def accumulate(self, ids: torch.Tensor) -> torch.Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        (loss / self.micro_batches).backward()
        return loss.detach()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def versions(self) -> dict:
        return {}


class LoRATrainer(TorchTrainer):
    """The same loop with peft's LoRA on every linear of the layers, adapters and AdamW's states in bf16."""

    def __init__(self, path: str, options: dict, micro_batches: int, device: torch.device):
        from peft import LoraConfig, get_peft_model

        base, self.micro_batches = build_model(path, options, device), micro_batches
        config = LoraConfig(r=int(options.get("r", 8)), target_modules="all-linear", lora_dropout=0.0)
        # peft's default makes the adapters fp32, and with them a second, fp32 copy of every input.
        self.model = get_peft_model(base, config, autocast_adapter_dtype=False)
        self.config, self.parameters = base.config, sum(p.numel() for p in self.model.parameters())
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")


class DeepSpeedTrainer:
    """``deepspeed.initialize`` with a ZeRO stage."""

    def __init__(
        self, path: str, backend: str, optimizer: str, options: dict, micro_batches: int, device: torch.device
    ):
        import deepspeed

        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        stage = int(backend.removeprefix("zero"))
        pure = options.get("states", "fp32") == "bf16"
        # On the host it is DeepSpeed's own AdamW; else torch's, which need not be compiled, or ours of 8-bit states.
        on_host = {"device": "cpu", "pin_memory": device.type == "cuda"}
        offload = {"offload_optimizer": on_host} if "offload" in options else {}
        if options.get("offload") == "param":
            offload["offload_param"] = on_host
        torchs = not offload and options.get("adamw") != "8bit"
        adamw = {"torch_adam": True, **({"fused": True} if device.type == "cuda" else {})} if torchs else {}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": micro_batches,
            "bf16": {"enabled": True, "bf16_master_weights_and_grads": pure, "bf16_optimizer_states": pure},
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": options.get("overlap", "1") == "1",
                "contiguous_gradients": options.get("contiguous", "1") == "1",
                "reduce_bucket_size": int(options.get("bucket", 100_000_000)),
                "allgather_bucket_size": 200_000_000,
                "stage3_prefetch_bucket_size": int(options.get("prefetch", 100_000_000)),
                "stage3_param_persistence_threshold": 100_000,
                **offload,
            },
            "optimizer": {
                "type": optimizer,
                "params": {**optimizer_params(optimizer, options), **adamw},
            },
            "steps_per_print": 10**9,
        }
        # While it lives, transformers builds models under zero.Init in stage 3.
        self._hf_config = HfDeepSpeedConfig(config)
        model = build_model(path, options, device)
        self.config = model.config
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        if options.get("leaf") == "1":
            config["zero_optimization"]["leaf_module"] = {"classes": list(model._no_split_modules)}
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        self._version = deepspeed.__version__
        self.micro_batches, self._count = micro_batches, 0

    def accumulate_over(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.engine.set_train_batch_size(micro_batches * self.engine.dp_world_size)

    def accumulate(self, ids: torch.Tensor) -> torch.Tensor:
        if self._count:
            self.engine.step()  # counts the micro-batch before; the last one's call is the optimizer's
        self._count = (self._count + 1) % self.micro_batches
        self.engine.set_gradient_accumulation_boundary(self._count == 0)
        loss = self.engine(input_ids=ids, labels=ids).loss
        self.engine.backward(loss)
        return loss.detach()

    def step(self) -> None:
        self.engine.step()

    def versions(self) -> dict:
        return {"deepspeed": self._version, "world_size": int(os.environ.get("WORLD_SIZE", 1))}
