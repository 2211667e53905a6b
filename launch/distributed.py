"""Joining the other ranks, where there are any, and leaving them, with DeepSpeed's CPU leftovers cleared."""

import argparse
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from torch import distributed as dist

from launch.engines import Engine
from launch.errors import UserError
from launch.quiet import quiet_libraries, without_built_lines
from launch.shared_buffer import unlink_shared_buffer


def join_ranks(argv: list[str], engine: Engine) -> None:
    """Start torch.distributed, through DeepSpeed where that trains, with the ``--ddp_timeout`` of the command line.

    To be called before HF's ``TrainingArguments`` exist: on a CPU those would start it without DeepSpeed, and
    ``zero.Init`` would then find no communication of its own.

    Raises:
        UserError: one process would have several GPUs, or the timeout is no number.
    """
    quiet_libraries()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ddp_timeout", "--ddp-timeout", type=int, default=1800)  # HF's, who would come too late
    try:
        seconds = parser.parse_known_args(argv)[0].ddp_timeout
    except SystemExit:
        raise UserError("--ddp_timeout must be a whole number of seconds, such as 1800.") from None
    if engine is Engine.DEEPSPEED:
        with without_built_lines():
            deepspeed.init_distributed(timeout=timedelta(seconds=seconds))
        if not torch.cuda.is_available():
            unlink_shared_buffer()
    elif engine is Engine.ONE:
        check_one_gpu(torch.cuda.device_count())
    else:
        join_torch(timedelta(seconds=seconds))


def check_one_gpu(gpus: int) -> None:
    """HF would copy the model to all GPUs of one process, by torch's DataParallel, which ds_mofa does not know.

    Raises:
        UserError: there are several.
    """
    if gpus > 1:
        raise UserError(
            f"One process, and {gpus} GPUs. `torchrun --nproc_per_node {gpus} launch/train.py ...` trains on all, "
            "CUDA_VISIBLE_DEVICES=0 in front on one."
        )


def join_torch(timeout: timedelta) -> None:
    """Both backends where there are GPUs: states are gathered on the host too."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        # By itself Accelerate counts CPUs, and HF has torch.load put a state on "cpu:1", which it does not know.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)


def from_first_rank(work: Callable[[], Any]) -> Any:
    """What ``work`` returns on rank 0, on every rank; it runs on that one alone. Collective."""
    if not dist.is_initialized():
        return work()
    result = [work() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


def leave_ranks() -> None:
    """Wait for all ranks, then close the communication.

    Without the wait a rank may be gone while rank 0 still writes the model; without the closing, its communication
    threads may outlive the interpreter and abort the process, upon which the launcher kills the others.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
