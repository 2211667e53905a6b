"""Start the ranks of one machine, and end with them: what a launcher does, and one thing that launchers do not.

SIGTERM goes to every rank, which is all that is sent: they may take the time to save that they need, where torchrun and
DeepSpeed's launcher kill after 30 s, and the ``deepspeed`` command passes nothing on. If all of them then end as told, the
status is 143. As a container's first process it needs no init beside it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence

__all__ = ["ENDED", "GRACE", "run"]

ENDED = 128 + signal.SIGTERM  # of a process that SIGTERM has ended, as shells have it
GRACE = 30.0  # seconds that the other ranks of one that has failed have, before they are killed
_POLL = 0.1


def run(command: Sequence[str], count: int) -> int:
    """Run ``command`` as ranks 0 to ``count`` - 1, and wait for all of them.

    Returns:
        0; 143 where SIGTERM came and no rank failed otherwise; or the status of the first rank that failed.
    """
    asked = False

    def on_sigterm(*_: object) -> None:
        nonlocal asked
        asked = True
        _send(processes, signal.SIGTERM)

    processes: list[subprocess.Popen] = []
    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "LOCAL_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": _free_port()}
        threads = {"OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // count)} if count > 1 else {}
        for rank in range(count):
            own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
            given = {name: str(value) for name, value in (shared | own).items()}
            environment = {**{name: str(value) for name, value in threads.items()}, **os.environ, **given}
            processes.append(subprocess.Popen(command, env=environment))
            if asked:  # while it was being started
                _send(processes, signal.SIGTERM)
        return _wait(processes, lambda: asked)
    finally:
        _send(processes, signal.SIGKILL)
        for process in processes:
            process.wait()
        signal.signal(signal.SIGTERM, before)


def _wait(processes: list[subprocess.Popen], asked: Callable[[], bool]) -> int:
    failed, deadline = None, None
    while None in [process.poll() for process in processes]:
        if failed is None:
            failed = _failure(processes, asked())
            if failed is not None:
                deadline = time.monotonic() + GRACE
                _send(processes, signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            _send(processes, signal.SIGKILL)
            deadline = None
        with contextlib.suppress(KeyboardInterrupt):  # which every rank has had too
            time.sleep(_POLL)
    if failed is None:
        failed = _failure(processes, asked())
    if failed is not None:
        return failed
    return ENDED if asked() and any(map(_status, processes)) else 0


def _failure(processes: list[subprocess.Popen], asked: bool) -> int | None:
    """The status of the first rank that has failed, and not ended because it was asked to."""
    statuses = map(_status, processes)
    return next((status for status in statuses if status and not (asked and status == ENDED)), None)


def _status(process: subprocess.Popen) -> int | None:
    code = process.returncode
    return code if code is None or code >= 0 else 128 - code


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
