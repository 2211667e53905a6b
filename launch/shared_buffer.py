"""What DeepSpeed's communication on a CPU leaves behind."""

import os
from pathlib import Path

import torch


def unlink_shared_buffer() -> None:
    """Remove this rank's 69 MB all-reduce buffer from /dev/shm.

    DeepSpeed's CPU communication never does, and a few dozen runs would fill the memory of a small machine. Every rank
    has mapped all buffers by the time of the barrier, and a mapping outlives its name.
    """
    torch.distributed.barrier()
    name = "deepspeed_allreduce_buffer_{}_{}_{}_{}".format(
        os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"]
    )
    (Path("/dev/shm") / name).unlink(missing_ok=True)
