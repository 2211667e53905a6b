"""One measured run of profiling/verify_claim.py, under the memory profiler from before the first allocation."""

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from ds_mofa.profiler import MemoryProfiler
from ds_mofa.profiler.setting import RunSetting
from launch.shared_buffer import unlink_shared_buffer
from profiling.engine_trainers import make_trainer
from profiling.throughput_worker import clock, freeze_garbage
from profiling.trainers import Trainer

__all__ = ["WARM_UP", "main", "turns"]

WARM_UP = 2  # steps before the one that is recorded allocation by allocation


def main(argv: Sequence[str] | None = None) -> None:
    """In a process of its own, or in one of ranks that have been joined already, which stay joined."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--model_config", required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--sample_hz", type=float, required=True)
    parser.add_argument("--predicted", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--memory_snapshot", action="store_true")
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)))
    args = parser.parse_args(argv)

    joined = torch.distributed.is_initialized()
    setting = RunSetting.parse(args.run, model_config=args.model_config, shape=args.shape, gpus=args.gpus)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", args.local_rank) if cuda else torch.device("cpu")
    predicted = json.loads(Path(args.predicted).read_text())
    with MemoryProfiler(
        output_dir=args.output_dir,
        sample_hz=args.sample_hz,
        detail_step=WARM_UP,
        stacks=True,
        memory_snapshot=args.memory_snapshot,
        device=device,
        setting={"name": args.run, "shape": args.shape, "model_config": args.model_config},
        predicted=predicted if "categories" in predicted else None,
    ) as profiler:
        if "error" in predicted:
            profiler.notes.append(f"No prediction: {predicted['error']}")
        if cuda:
            torch.cuda.set_device(device)
        torch.manual_seed(0)
        trainer = make_trainer(setting, device)
        if not joined and not cuda and setting.zero is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            unlink_shared_buffer()
        profiler.watch(trainer.engine or trainer.model, trainer.optimizer)
        generator = torch.Generator().manual_seed(args.local_rank)
        size = (setting.micro_batches, setting.micro_batch, setting.seq)
        batches = torch.randint(trainer.config.get_text_config().vocab_size, size, generator=generator).to(device)

        for _ in range(WARM_UP + 1):
            one_step(trainer, batches, profiler, device)
        freeze_garbage()  # the recorded step's history, too
        with_profiler, without = [], []
        for watched in turns(args.steps):
            with contextlib.nullcontext() if watched else profiler.paused():
                (with_profiler if watched else without).append(one_step(trainer, batches, profiler, device))
        profiler.setting["seconds_per_step"] = statistics.median(with_profiler)
        profiler.setting["seconds_per_step_without_profiler"] = statistics.median(without)
        profiler.setting["all_seconds"] = {"with": with_profiler, "without": without}
    if torch.distributed.is_initialized() and not joined:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def turns(pairs: int) -> Iterator[bool]:
    """Whether the profiler is on, step by step: off, on, on, off, off, on ..., so that a drift falls on both alike."""
    for pair in range(pairs):
        yield from (bool(pair % 2), not pair % 2)


def one_step(trainer: Trainer, batches: torch.Tensor, profiler: MemoryProfiler, device: torch.device) -> float:
    """Seconds of one optimizer step, the device's work included."""
    start = clock(device)
    for ids in batches:
        trainer.accumulate(ids)
    trainer.step()
    profiler.step()
    return clock(device) - start


if __name__ == "__main__":
    main()
