"""Each run in a process of its own: its peak memory is its own, and a killed one takes no other along."""

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from launch.errors import UserError

__all__ = ["in_own_process", "in_own_processes", "start_method"]

_PRELOADED = ["experiments.comparison.training", "experiments.comparison.tasks", "experiments.comparison.report"]
_PROBE_SECONDS = 180.0  # that the server's imports and the GPU's first use may take


def in_own_process(function: Callable[..., Any], *args: Any, device: str) -> Any:
    """``function(*args, device)``, in a new process.

    Raises:
        UserError: as the function did, or its process was killed.
        RuntimeError: the function raised anything else; holds its traceback.
    """
    with contextlib.closing(in_own_processes(function, [args], device=device)) as ended:
        return next(ended)[1]


def in_own_processes(
    function: Callable[..., Any], calls: Sequence[tuple], *, device: str, jobs: int = 1
) -> Iterator[tuple[int, Any]]:
    """``function(*args, device)`` for the args of each call, in a new process each, ``jobs`` at a time.

    Started in their order, and each yielded as it ends, as its place in ``calls`` and its value. None starts while the
    caller looks at one. On device "cuda" each takes the GPU that fewest of them run on. Close the iterator
    (``contextlib.closing``): with it, or with an error in one, all others end.

    Raises:
        UserError: as one did, or its process was killed.
        RuntimeError: one raised anything else; holds its traceback.
    """
    context = _context(start_method(device))
    # Of several at a time each takes its share of the cores; one alone takes what PyTorch would.
    threads = max(1, len(os.sched_getaffinity(0)) // jobs) if jobs > 1 else None
    gpus = range(torch.cuda.device_count()) if device == "cuda" else ()
    waiting, running = list(enumerate(calls)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, args = waiting.pop(0)
                busy = collections.Counter(gpu for _, _, gpu in running.values())
                gpu = min(gpus, key=busy.__getitem__, default=None)
                receiver, process = _start(context, _Place(threads, gpu), function, (*args, device))
                running[receiver] = index, process, gpu
            receiver = multiprocessing.connection.wait(list(running))[0]
            value = _result(receiver, running[receiver][1])
            index, *_ = running.pop(receiver)
            yield index, value
    finally:
        for _, process, _ in running.values():
            process.kill()
        for _, process, _ in running.values():
            process.join(10)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a process computes: by how many ``threads`` on the CPU, on which ``gpu``; None: PyTorch's choice."""

    threads: int | None = None
    gpu: int | None = None


@functools.cache
def start_method(device: str) -> str:
    """How processes start for a device: "forkserver", or "spawn" where that is found not to work.

    A fork of a server that has imported everything starts at once. CUDA does not survive a fork, and whether some
    import has touched it can only be tried: one process does, and where it cannot use the GPU, which is printed, the
    imports are made anew for each process.
    """
    if not device.startswith("cuda"):
        return "forkserver"
    receiver, process = _start(_context("forkserver"), _Place(), _unusable, (device,))
    try:
        reason = _result(receiver, process) if receiver.poll(_PROBE_SECONDS) else f"no answer in {_PROBE_SECONDS:.0f} s"
    except (UserError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
    finally:
        process.kill()
    if reason is None:
        return "forkserver"
    print(f"A forked process cannot use the GPU ({reason}), so each run imports everything anew.", flush=True)
    return "spawn"


def _unusable(device: str) -> str | None:
    """Why this process cannot use the GPU, or None."""
    if torch.cuda._is_in_bad_fork():
        return "an import has initialised CUDA before the fork"
    assert torch.ones(64, 64, device=device).mm(torch.ones(64, 64, device=device)).sum().item() == 64**3
    return None


def _context(method: str) -> BaseContext:
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        # Python 3.11's server has neither our sys.path nor a complaint about a module that it does not find.
        root = str(Path(__file__).resolve().parents[2])
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if root not in paths:
            os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])
        # An import that asks whether there is a GPU must not initialise CUDA in the server.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        context.set_forkserver_preload(_PRELOADED)
    return context


def _start(
    context: BaseContext, place: _Place, function: Callable[..., Any], args: tuple
) -> tuple[Connection, BaseProcess]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, place, function, args), daemon=True)
    process.start()
    sender.close()
    return receiver, process


def _result(receiver: Connection, process: BaseProcess) -> Any:
    try:
        outcome, value = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        raise UserError(
            f"the process of this run ended without a result (exit code {process.exitcode}; -9 is most often the "
            "system, out of memory). Lower training.batch_size, or leave the setting out; the same command goes on."
        ) from None
    finally:
        receiver.close()
    if outcome == "returned":
        return value
    raise (UserError if outcome == "refused" else RuntimeError)(value)


def _report(sender: Connection, place: _Place, function: Callable[..., Any], args: tuple) -> None:
    # Ctrl-C reaches every process of a terminal; the one that was asked to stop ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if place.threads is not None:
        torch.set_num_threads(min(place.threads, torch.get_num_threads()))
    try:
        if place.gpu is not None:
            torch.cuda.set_device(place.gpu)
        outcome = "returned", function(*args)
    except UserError as error:
        outcome = "refused", str(error)
    except Exception:
        outcome = "raised", "in the process of a run:\n" + traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):  # who has asked was killed
        sender.send(outcome)


def _end_with_the_parent() -> None:
    """A parent that was killed ends nobody; a run that no one waits for would keep its GPU's memory."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
