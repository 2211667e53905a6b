"""One measured run of profiling/throughput.py: builds the model, trains a few steps, writes what it saw."""

import argparse
import gc
import json
import os
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import ds_mofa
from ds_mofa.phases import listening

OPTIONS = {
    "r", "capture", "states", "bucket", "contiguous", "overlap", "leaf", "prefetch", "checkpointing", "liger"
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--shapes", nargs="+", required=True)
    parser.add_argument("--model_config", required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--result", required=True)
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()

    backend, optimizer, options = parse_run(args.run)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", args.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)

    micro_batches = int(args.shapes[0].split("x")[1])
    if backend == "torch":
        trainer = TorchTrainer(args.model_config, optimizer, options, micro_batches, device)
    else:
        trainer = DeepSpeedTrainer(args.model_config, backend, optimizer, options, micro_batches, device)
    versions = {
        "hardware": torch.cuda.get_device_name() if cuda else "CPU",
        "model": Path(args.model_config).stem,
        "parameters": trainer.parameters,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ds_mofa": ds_mofa.__version__,
        **trainer.versions(),
    }
    results = {}
    for shape in args.shapes:
        results[shape] = {**measure(trainer, shape, args, device), **versions}
        if args.local_rank == 0:
            Path(args.result).write_text(json.dumps(results))


def measure(trainer, shape: str, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Times and memory of training steps on a batch of TOKENSxMICRO_BATCHES, the same in each."""
    tokens, micro_batches = map(int, shape.split("x"))
    trainer.accumulate_over(micro_batches)
    cuda = device.type == "cuda"
    generator = torch.Generator().manual_seed(args.local_rank)
    batches = torch.randint(trainer.config.vocab_size, (micro_batches, 1, tokens), generator=generator).to(device)
    if cuda:  # the driver's figure is to be of this shape
        torch.cuda.empty_cache()
    micro_ms, step_ms = [], []
    loss = None
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            freeze_garbage()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        start = clock(device)
        for ids in batches:
            loss = trainer.accumulate(ids)
        middle = clock(device)
        trainer.step()
        end = clock(device)
        if step >= args.warmup:
            micro_ms.append((middle - start) * 1e3 / micro_batches)
            step_ms.append((end - middle) * 1e3)

    micro, step = statistics.median(micro_ms), statistics.median(step_ms)
    memory = memory_used(args.local_rank) if cuda else {}
    parts = look_inside(trainer, batches) if cuda else {}
    return {
        "micro_batch_ms": round(micro, 2),
        "step_ms": round(step, 2),
        "tokens_per_second": round(tokens * micro_batches / (micro * micro_batches + step) * 1e3),
        **memory,
        **parts,
        "last_loss": round(float(loss), 4),
    }


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


def freeze_garbage() -> None:
    """Take what is alive out of Python's cyclic garbage collection.

    A full collection visits every object of the model and its libraries, which takes tenths of a second, and comes once
    in several steps: whatever is measured then would pay for it.
    """
    gc.collect()
    gc.freeze()


def clock(device: torch.device) -> float:
    """Seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_used(index: int) -> dict[str, float]:
    """Of this process by PyTorch's allocator, and of the whole GPU, by all processes, as the driver counts it."""
    import pynvml

    pynvml.nvmlInit()
    driver = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).used
    return {
        "peak_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "nvml_gb": round(driver / 1e9, 2),
    }


def look_inside(trainer, batches: torch.Tensor) -> dict[str, float]:
    """One more step, watched: its parts, and for how long the GPU works in a micro-batch that it need not wait for."""
    phases = PhaseTimes()
    for ids in batches[:-1]:
        trainer.accumulate(ids)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        trainer.accumulate(batches[-1])
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    with listening(phases):
        trainer.step()
    return {
        "micro_batch_gpu_ms": round(sum(kernel.device_time for kernel in kernels) / 1e3, 2),
        "micro_batch_kernels": len(kernels),
        **{f"{name.replace(' ', '_').lower()}_ms": round(ms, 2) for name, ms in phases.milliseconds().items()},
    }


class PhaseTimes:
    """Listens to the phases of a step and times them on the GPU."""

    def __init__(self):
        self._open: list[tuple[str, torch.cuda.Event]] = []
        self._done: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def enter(self, name: str) -> None:
        self._open.append((name, torch.cuda.Event(enable_timing=True)))
        self._open[-1][1].record()

    def leave(self, name: str) -> None:
        name, start = self._open.pop()
        self._done.append((name, start, torch.cuda.Event(enable_timing=True)))
        self._done[-1][2].record()

    def milliseconds(self) -> dict[str, float]:
        torch.cuda.synchronize()
        total: dict[str, float] = {}
        for name, start, end in self._done:
            total[name] = total.get(name, 0.0) + start.elapsed_time(end)
        return total


def build_model(path: str, options: dict, device: torch.device):
    config = AutoConfig.for_model(**json.loads(Path(path).read_text()))
    config.use_cache = False
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if options.get("liger") == "1":
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, None)
    if options.get("checkpointing") == "1":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def optimizer_params(optimizer: str, options: dict) -> dict:
    if optimizer.lower() != "mofasgd":
        return {"lr": 1e-5}
    chosen = {"capture": options["capture"]} if "capture" in options else {}
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


class DeepSpeedTrainer:
    """``deepspeed.initialize`` with a ZeRO stage."""

    def __init__(
        self, path: str, backend: str, optimizer: str, options: dict, micro_batches: int, device: torch.device
    ):
        import deepspeed

        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        stage = int(backend.removeprefix("zero"))
        pure = options.get("states", "fp32") == "bf16"
        fused = {"fused": True} if device.type == "cuda" else {}
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
            },
            "optimizer": {
                "type": optimizer,
                "params": {**optimizer_params(optimizer, options), "torch_adam": True, **fused},
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


if __name__ == "__main__":
    main()
