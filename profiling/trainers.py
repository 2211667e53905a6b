"""What profiling's commands measure: a model with random weights, and a loop that trains it.

Here the loops of one process; :mod:`profiling.ranks_trainers` has torch's on several, DDP and FSDP2, and
:mod:`profiling.deepspeed_trainer` DeepSpeed's.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.graphed import GraphedMicroBatch
from ds_mofa.optimizers.registry import OPTIMIZERS
from ds_mofa.parameters import split_parameters
from ds_mofa.parameters.experts import holds_experts
from ds_mofa.profiler.predict.simulated.model import attention
from ds_mofa.profiler.setting import RunSetting, SettingError
from ds_mofa.weights.int8 import put_in, serves

__all__ = [
    "TorchTrainer",
    "Trainer",
    "Materializer",
    "build_model",
    "LoRATrainer",
    "check_measurable",
    "optimizer_params",
    "pretend_to_be",
]

# What a process takes of a GPU beside its context and what PyTorch's allocator shows, once its libraries have loaded: cuBLAS's
# workspaces, the kernels of Triton and PyTorch, and NCCL. Bytes, seen on an H200.
_LIBRARIES = 1.1e9
_NCCL = 0.6e9
# While a graph is captured transformers writes a mask of tokens x tokens, with which sdpa takes a slower kernel. An attention
# of a name that it does not know gets none, and is causal.
_WITHOUT_MASK = "sdpa_without_mask"


class Trainer(Protocol):
    """A model and a loop that trains it.

    Attributes:
        model: what is called.
        config: its shape.
        parameters: how many it has.
        optimizer: what steps; None where an engine has it.
        engine: DeepSpeed's; None without.
        skipped: steps so far that have changed nothing, for a gradient held a NaN or Inf.
    """

    model: nn.Module
    config: PretrainedConfig
    parameters: int
    optimizer: Any
    engine: Any
    skipped: int

    def accumulate_over(self, micro_batches: int) -> None: ...

    def accumulate(self, ids: Tensor) -> Tensor:
        """Forward and backward of one micro-batch, (sequences, tokens); its loss."""

    def step(self) -> None: ...

    def versions(self) -> dict[str, Any]:
        """Of what the loop brings in, for a result row."""


def check_measurable(setting: RunSetting) -> None:
    """
    Raises:
        SettingError: a run that can be predicted, and that nothing here trains.
    """
    plain = setting.backend == "torch"
    if setting.entry is None and setting.optimizer not in ("AdamW", *(["LoRA"] if plain else [])):
        able = ", ".join(["AdamW", *OPTIMIZERS, "and without ZeRO LoRA"])
        raise SettingError(f"{setting.run} cannot be measured, only predicted: measured can be {able}")


def pretend_to_be(size: float, device: torch.device, distributed: bool) -> None:
    """Let the allocator run out of memory where a GPU of ``size`` bytes would: contexts and libraries take their part."""
    free, total = torch.cuda.mem_get_info(device)
    libraries = _LIBRARIES + (_NCCL if distributed else 0)
    torch.cuda.set_per_process_memory_fraction((size - (total - free) - libraries) / total, device)


def build_model(setting: RunSetting, device: torch.device) -> nn.Module:
    """In training mode, with what the setting says of its layers; weights are random, on ``device``."""
    if setting.weights == "int8" and device.type != "meta":
        model = build_model(setting, torch.device("meta"))
        Materializer(model, setting, device)(model)
        return model
    config = AutoConfig.for_model(**json.loads(Path(setting.model_config).read_text()))
    config.get_text_config().use_cache = config.use_cache = False
    dtype = torch.float32 if setting.weights == "fp32" else torch.bfloat16
    kind = attention(config)
    if setting.graphed and kind == "sdpa" and "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        AttentionInterface.register(_WITHOUT_MASK, sdpa_attention_forward)
        kind = _WITHOUT_MASK
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)
    if setting.liger:
        # Its loss waits for the device, which no graph can; its experts' gradients are whole, which ours are there to spare.
        others = setting.option("fused_head") or setting.graphed
        forms = setting.optimizer not in OPTIMIZERS or not any(map(holds_experts, model.modules()))
        apply_liger_kernel(model, {"fused_linear_cross_entropy": not others, "swiglu": forms})
    if setting.embed == "frozen":
        model.get_input_embeddings().weight.requires_grad_(False)
    if setting.checkpointing:  # a random state cannot be captured in a graph, and these models draw nothing
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": not setting.graphed})
    if setting.compiled:
        for layer in model.modules():
            if type(layer).__name__ in model._no_split_modules:
                layer.compile()
    return model.train()


class Materializer:
    """Gives a model of the meta device random weights, one module after the other, and puts its matrices into eight bits where
    the setting says so: no device need have room for all sixteen.
    """

    def __init__(self, model: PreTrainedModel, setting: RunSetting, device: torch.device):
        self._model, self._device = model, device
        self._small: set[tuple[nn.Module, str]] = set()
        if setting.weights == "int8":
            split = split_parameters(model, model.parameters(), setting.entry.options(**optimizer_params(setting)))
            small = [matrix for matrix in split.matrices if serves(matrix.full_shape, matrix.param.dtype)]
            self._small = {slot for matrix in small for slot in matrix.slots}

    def __call__(self, module: nn.Module) -> None:
        """All that is in a module and has no weights yet; the last call is with the model."""
        for part in module.modules():
            own = (*part.parameters(recurse=False), *part.buffers(recurse=False))
            if any(tensor.is_meta for tensor in own):
                part.to_empty(device=self._device, recurse=False)
                self._model._init_weights(part)
                put_in(
                    self._model, [p for name, p in part.named_parameters(recurse=False) if (part, name) in self._small]
                )
        if module is self._model:
            self._model.tie_weights()


def optimizer_params(setting: RunSetting) -> dict[str, Any]:
    """With rates at which random weights learn."""
    if setting.entry is None:
        return {"lr": 1e-5}
    return {"lr": 6e-4, "adamw_lr": 1e-5, **setting.params(include=("lm_head",))}


class TorchTrainer:
    """A plain loop on one GPU: weights, gradients and AdamW's states in bf16."""

    engine = None
    _graphed: GraphedMicroBatch | None = None

    def __init__(self, setting: RunSetting, device: torch.device):
        self._take(build_model(setting, device), setting, device)

    def _take(self, model: nn.Module, setting: RunSetting, device: torch.device) -> None:
        """The model as it is trained, and its optimizer."""
        self.model, self.micro_batches = model, setting.micro_batches
        self.config, self.parameters = model.config, sum(p.numel() for p in model.parameters())
        params = optimizer_params(setting)
        self.optimizer: torch.optim.Optimizer
        if setting.entry is not None:
            self.optimizer = setting.entry.optimizer(model, **params)
        else:
            on_device = device.type == "cuda" and not setting.offload
            self.optimizer = torch.optim.AdamW(model.parameters(), **params, fused=on_device)

    @property
    def skipped(self) -> int:
        return self.optimizer.matrices.skipped if isinstance(self.optimizer, MatrixOptimizer) else 0

    def accumulate_over(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches

    def graph(self) -> None:
        """Make a CUDA graph of each micro-batch from now on."""
        self._graphed = GraphedMicroBatch(self._scaled_loss, self.optimizer)

    def accumulate(self, ids: Tensor) -> Tensor:
        if self._graphed is not None:
            return self._graphed(ids, self.micro_batches) * self.micro_batches
        loss = self.model(input_ids=ids, labels=ids).loss
        (loss / self.micro_batches).backward()
        return loss.detach()

    def _scaled_loss(self, ids: Tensor, micro_batches: int) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss / micro_batches

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
