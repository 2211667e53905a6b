"""Joining the other ranks and leaving them, with DeepSpeed's CPU leftovers cleared."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import datasets
import deepspeed
import torch

from launch.errors import UserError
from launch.shared_buffer import unlink_shared_buffer


def join_ranks(argv: list[str]) -> None:
    """Start torch.distributed through DeepSpeed, with the ``--ddp_timeout`` of the command line.

    To be called before HF's ``TrainingArguments`` exist: on a CPU those would start it without DeepSpeed, and
    ``zero.Init`` would then find no communication of its own.
    """
    if "RANK" not in os.environ:
        raise UserError(
            "No launcher started this process. Use `deepspeed launch/train.py ...` (one process per GPU), or "
            "`accelerate launch --config_file configs/accelerate_zero2.yaml launch/train.py ...`."
        )
    # DeepSpeed's calls by older names: news for its authors, once per rank and name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if os.environ["RANK"] != "0" or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ddp_timeout", "--ddp-timeout", type=int, default=1800)  # HF's, who would come too late
    try:
        seconds = parser.parse_known_args(argv)[0].ddp_timeout
    except SystemExit:
        raise UserError("--ddp_timeout must be a whole number of seconds, such as 1800.") from None
    deepspeed.init_distributed(timeout=timedelta(seconds=seconds))
    if not torch.cuda.is_available():
        unlink_shared_buffer()


def from_first_rank(work: Callable[[], Any]) -> Any:
    """What ``work`` returns on rank 0, on every rank; it runs on that one alone. Collective."""
    result = [work() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(result)
    return result[0]


def leave_ranks() -> None:
    """Wait for all ranks, then close the communication.

    Without the wait a rank may be gone while rank 0 still writes the model; without the closing, its communication
    threads may outlive the interpreter and abort the process, upon which the launcher kills the others.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
