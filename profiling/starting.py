"""How a run's processes are started: one, torchrun's, or DeepSpeed's."""

import os
import socket
import sys
from pathlib import Path

from ds_mofa.profiler.setting import RunSetting

__all__ = ["ROOT", "environment", "launcher"]

ROOT = Path(__file__).resolve().parents[1]


def launcher(setting: RunSetting) -> list[str]:
    """The words before a script's own, for so many processes as the setting has GPUs."""
    python = [sys.executable]
    if setting.zero is not None:
        return [*python, "-m", "deepspeed.launcher.runner", *_words("num_gpus", setting.gpus)]
    if setting.backend == "torch":
        return python
    # The dashes keep it from reading the script's --run as an abbreviation of its own --run-path.
    return [*python, "-m", "torch.distributed.run", *_words("nproc_per_node", setting.gpus), "--"]


def _words(processes: str, count: int) -> list[str]:
    return [f"--{processes}", str(count), "--master_port", str(_free_port())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """This process's, in which this repository's packages are found first."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
