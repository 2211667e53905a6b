"""Each run in a process of its own: its peak memory is its own, and a killed one takes no other along."""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from launch.errors import UserError

__all__ = ["in_own_process"]


def in_own_process(function: Callable[..., Any], *args: Any, device: str) -> Any:
    """``function(*args, device)``, in a new process.

    Raises:
        UserError: as the function did, or its process was killed.
        RuntimeError: the function raised anything else; holds its traceback.
    """
    # A fork of a server that has imported everything starts at once. CUDA does not survive a fork, and whether some
    # import has touched it cannot be known, so there the imports are made each time.
    context = multiprocessing.get_context("spawn" if device.startswith("cuda") else "forkserver")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["launch.comparison.training", "launch.comparison.tasks"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, function, (*args, device)), daemon=True)
    process.start()
    sender.close()
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
        process.kill()  # one that has ended does not mind; at an interruption it must not go on alone
    if outcome == "returned":
        return value
    raise (UserError if outcome == "refused" else RuntimeError)(value)


def _report(sender: Connection, function: Callable[..., Any], args: tuple) -> None:
    try:
        outcome = "returned", function(*args)
    except UserError as error:
        outcome = "refused", str(error)
    except Exception:
        outcome = "raised", "in the process of a run:\n" + traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):  # who has asked was killed
        sender.send(outcome)
