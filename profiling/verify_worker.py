"""One measured run of profiling/verify_claim.py, under the memory profiler from before the first allocation."""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)

import torch

from ds_mofa.profiler import MemoryProfiler

WARM_UP = 2  # steps before the one that is recorded allocation by allocation


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--model_config", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--sample_hz", type=float, required=True)
    parser.add_argument("--predicted", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--memory_snapshot", action="store_true")
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()

    tokens, micro_batches = map(int, args.shape.split("x"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", args.local_rank) if cuda else torch.device("cpu")
    setting = {"name": args.run, "shape": args.shape, "model_config": args.model_config}
    predicted = json.loads(Path(args.predicted).read_text())
    with MemoryProfiler(
        output_dir=args.output_dir,
        sample_hz=args.sample_hz,
        detail_step=WARM_UP,
        stacks=True,
        memory_snapshot=args.memory_snapshot,
        device=device,
        setting=setting,
        predicted=predicted if "categories" in predicted else None,
    ) as profiler:
        if "error" in predicted:
            profiler.notes.append(f"No prediction: {predicted['error']}")
        if cuda:
            torch.cuda.set_device(device)
        torch.manual_seed(0)
        worker, trainers = load_worker()
        trainer = trainers.make_trainer(args.run, args.model_config, micro_batches, device)
        if not cuda and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from launch.distributed import unlink_shared_buffer  # brings in what only the training command needs

            unlink_shared_buffer()
        profiler.watch(getattr(trainer, "engine", None) or trainer.model, getattr(trainer, "optimizer", None))
        generator = torch.Generator().manual_seed(args.local_rank)
        batches = torch.randint(trainer.config.vocab_size, (micro_batches, 1, tokens), generator=generator).to(device)

        for _ in range(WARM_UP + 1):
            one_step(trainer, batches, profiler, device)
        worker.freeze_garbage()  # the recorded step's history, too
        with_profiler, without = [], []
        for watched in turns(args.steps):
            with contextlib.nullcontext() if watched else profiler.paused():
                (with_profiler if watched else without).append(one_step(trainer, batches, profiler, device))
        profiler.setting["seconds_per_step"] = statistics.median(with_profiler)
        profiler.setting["seconds_per_step_without_profiler"] = statistics.median(without)
        profiler.setting["all_seconds"] = {"with": with_profiler, "without": without}
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def turns(pairs: int) -> Iterator[bool]:
    """Whether the profiler is on, step by step: off, on, on, off, off, on ..., so that a drift falls on both alike."""
    for pair in range(pairs):
        yield from (bool(pair % 2), not pair % 2)


def one_step(trainer, batches: torch.Tensor, profiler: MemoryProfiler, device: torch.device) -> float:
    """Seconds of one optimizer step, the device's work included."""
    start = clock(device)
    for ids in batches:
        trainer.accumulate(ids)
    trainer.step()
    profiler.step()
    return clock(device) - start


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def load_worker():
    """profiling/throughput.py's worker and trainers; late, since their libraries belong to the run that is measured."""
    sys.path.append(str(HERE))
    import throughput_worker
    import trainers

    return throughput_worker, trainers


if __name__ == "__main__":
    main()
