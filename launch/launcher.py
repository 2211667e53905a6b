"""The ``deepspeed`` command, which ends at SIGTERM and lets its ranks train on: they notice, and stop as if told.

It starts DeepSpeed's launcher, and that the ranks. The signal reaches the first alone where a shell, a scheduler or
``docker stop`` sends it to the process that it has started. Whatever ends the command, each rank then gets SIGTERM from
itself: before the training that ends it, from there on it is a checkpoint (:mod:`launch.preemption`).
"""

import os
import signal
import threading
import time

import psutil

__all__ = ["command_of", "end_with_launcher", "lives"]

_LAUNCHER, _COMMANDS = "deepspeed.launcher.launch", ("deepspeed", "ds", "deepspeed.launcher.runner", "runner.py")
_SECONDS = 0.5


def end_with_launcher() -> None:
    """From here on, SIGTERM to this process when the command that has started the launcher is gone."""
    command = command_of(psutil.Process())
    if command is not None:
        threading.Thread(target=_watch, args=(command,), daemon=True).start()


def command_of(rank: psutil.Process) -> psutil.Process | None:
    """The ``deepspeed`` command that a rank belongs to; None where another launcher started it, or a remote one."""
    try:
        launcher = rank.parent()
        if launcher is None or _LAUNCHER not in launcher.cmdline():
            return None
        command = launcher.parent()
        words = [] if command is None else command.cmdline()
    except psutil.Error:
        return None
    return command if any(os.path.basename(word) in _COMMANDS for word in words) else None


def lives(process: psutil.Process | None) -> bool:
    """Whether a process is there, and is not one that has ended and whose parent has not asked for its status."""
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # one that this process may not look at


def _watch(command: psutil.Process) -> None:
    while lives(command):
        time.sleep(_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
