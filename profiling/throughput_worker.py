"""One measured run of profiling/throughput.py: builds the model, trains a few steps, writes what it saw."""

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import transformers
from torch import Tensor

import ds_mofa
from ds_mofa.phases import listening
from ds_mofa.profiler.measure.flops import flops_per_token, peak_flops
from ds_mofa.profiler.setting import RunSetting
from profiling.collectives import collective_times
from profiling.engine_trainers import make_trainer
from profiling.timeline import draw_timeline
from profiling.trainers import Trainer

__all__ = ["clock", "freeze_garbage", "measure"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--shapes", nargs="+", required=True)
    parser.add_argument("--model_config", required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--result", required=True)
    parser.add_argument("--timelines", type=Path, help="folder for a picture of one step of each shape")
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)))
    args = parser.parse_args(argv)

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", args.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)

    setting = RunSetting.parse(args.run, model_config=args.model_config, shape=args.shapes[0], gpus=args.gpus)
    trainer = make_trainer(setting, device)
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
        results[shape] = {**measure(trainer, setting.but(shape=shape), args, device), **versions}
        if args.local_rank == 0:
            Path(args.result).write_text(json.dumps(results))
    if torch.distributed.is_initialized() and setting.zero is None:
        torch.distributed.destroy_process_group()


def measure(trainer: Trainer, setting: RunSetting, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times and memory of training steps on a batch of the setting's shape, the same in each."""
    tokens, micro_batches = setting.seq, setting.micro_batches
    trainer.accumulate_over(micro_batches)
    cuda = device.type == "cuda"
    generator = torch.Generator().manual_seed(args.local_rank)
    batches = torch.randint(
        trainer.config.get_text_config().vocab_size, (micro_batches, 1, tokens), generator=generator
    ).to(device)
    if cuda:  # the driver's figure is to be of this shape
        torch.cuda.empty_cache()
    micro_ms, step_ms, losses = [], [], []
    energy = 0.0
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            freeze_garbage()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                energy = joules(args.local_rank)
        start = clock(device)
        total = sum(trainer.accumulate(ids) for ids in batches)
        middle = clock(device)
        trainer.step()
        end = clock(device)
        losses.append(float(total) / micro_batches)
        if step >= args.warmup:
            micro_ms.append((middle - start) * 1e3 / micro_batches)
            step_ms.append((end - middle) * 1e3)

    micro, step = statistics.median(micro_ms), statistics.median(step_ms)
    # What the driver has counted since then is of all measured steps.
    energy = (joules(args.local_rank) - energy) / (args.steps * micro_batches * tokens) if cuda else 0.0
    memory = memory_used(args.local_rank) if cuda else {}
    parts = look_inside(trainer, batches) if cuda else {}
    if cuda and (args.timelines is not None or torch.distributed.is_initialized()):
        kernels = kernels_of(lambda: take_step(trainer, batches))
        if torch.distributed.is_initialized():
            parts |= collective_times(kernels)
        if args.timelines is not None and args.local_rank == 0:
            name = f"{setting.run}:{setting.shape}".replace(":", "_").replace("=", "")
            draw_timeline(kernels, args.timelines / f"{name}.png", f"{setting.run}, {setting.shape}")
    return {
        "micro_batch_ms": round(micro, 2),
        "step_ms": round(step, 2),
        "tokens_per_second": round(tokens * micro_batches / (micro * micro_batches + step) * 1e3),
        **utilisation(trainer, tokens, micro_batches, micro_ms, step_ms),
        **({"joules_per_token": round(energy, 4)} if cuda else {}),
        **memory,
        **parts,
        "losses": [round(loss, 4) for loss in losses],
        **({"skipped_steps": trainer.skipped} if trainer.skipped else {}),
    }


def utilisation(
    trainer: Trainer, tokens: int, micro_batches: int, micro_ms: Sequence[float], step_ms: Sequence[float]
) -> dict[str, Any]:
    """Least and most tokens/s of the steps, and the model FLOPs utilisation of their median where the card is known."""
    speeds = [tokens * micro_batches / (micro * micro_batches + step) * 1e3 for micro, step in zip(micro_ms, step_ms)]
    found: dict[str, Any] = {"tokens_per_second_range": [round(min(speeds)), round(max(speeds))]}
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if peak is not None:
        model: Any = getattr(trainer.model, "module", trainer.model)  # of a wrapper
        found["mfu"] = round(flops_per_token(model, tokens) * statistics.median(speeds) / peak, 4)
    return found


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


def handle_of(index: int) -> tuple[Any, Any]:
    """NVML, and its handle of a CUDA device, by the name: CUDA may have been told to count the devices otherwise."""
    import pynvml  # only there where a GPU is

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")


def joules(index: int) -> float:
    """What the GPU has used up so far, since the driver was loaded; 0 where the driver does not count it."""
    pynvml, device = handle_of(index)
    try:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3
    except pynvml.NVMLError_NotSupported:
        return 0.0


def memory_used(index: int) -> dict[str, float]:
    """Of this process by PyTorch's allocator, and of the whole GPU, by all processes, as the driver counts it."""
    pynvml, device = handle_of(index)
    driver = pynvml.nvmlDeviceGetMemoryInfo(device).used
    reserved = torch.cuda.max_memory_reserved()
    return {
        "peak_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "peak_reserved_gb": round(reserved / 1e9, 2),
        # As at the peak: the allocator may have given memory back since.
        "nvml_gb": round((driver - torch.cuda.memory_reserved() + reserved) / 1e9, 2),
        "host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def look_inside(trainer: Trainer, batches: Tensor) -> dict[str, float]:
    """One more step, watched: its parts, and for how long the GPU works in a micro-batch that it need not wait for."""
    phases = PhaseTimes()
    for ids in batches[:-1]:
        trainer.accumulate(ids)
    kernels = kernels_of(lambda: trainer.accumulate(batches[-1]))
    with listening(phases):
        trainer.step()
    return {
        "micro_batch_gpu_ms": round(sum(kernel.device_time for kernel in kernels) / 1e3, 2),
        "micro_batch_kernels": len(kernels),
        **{f"{name.replace(' ', '_').lower()}_ms": round(ms, 2) for name, ms in phases.milliseconds().items()},
    }


def take_step(trainer: Trainer, batches: Tensor) -> None:
    for ids in batches:
        trainer.accumulate(ids)
    trainer.step()


def kernels_of(work: Callable[[], Any]) -> list[Any]:
    """The profiler's events of what runs on the GPU for ``work``, from first to last."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


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


if __name__ == "__main__":
    main()
