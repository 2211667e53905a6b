"""SIGTERM, which machines that are taken back send some seconds before: save at the next step's end, and stop."""

import os
import signal
import socket
import threading

import psutil
import torch
from torch import distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EXIT_CODE = 128 + signal.SIGTERM  # as a shell reports a process that SIGTERM has ended


class SaveOnSigterm(TrainerCallback):
    """From its construction on, SIGTERM to any rank makes all of them save a checkpoint at the end of the same step.

    The ranks agree by an all-reduce of one number on the CPU at each step's end, which waits for no GPU.

    A launcher also sends SIGTERM to the ranks that are left when one has died. They may be waiting for that one, and
    have nothing to save: such a rank ends at once, or the launcher would wait 30 s for each of them in turn.

    Attributes:
        stopped: whether the training has been stopped, on every rank.
    """

    def __init__(self):
        self.stopped = False
        self._asked = False
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._peers = len(_peers())
        signal.signal(signal.SIGTERM, self._on_sigterm)
        # A handler runs between two lines of Python, and this process may be deep in a collective: a thread reads of
        # the signal as well.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._sockets = reader, writer
        threading.Thread(target=self._leave_the_dead, args=(reader,), daemon=True).start()

    def _on_sigterm(self, *_) -> None:
        self._asked = True

    def _leave_the_dead(self, signals: socket.socket) -> None:
        while number := signals.recv(1):
            if number[0] == signal.SIGTERM and len(_peers()) < self._peers:
                os._exit(EXIT_CODE)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        asked = torch.tensor([self._asked], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        if asked:
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may not be the time


def _peers() -> list[psutil.Process]:
    """The living processes that the launcher of this one has started."""
    try:
        started = psutil.Process(os.getppid()).children()
        return [process for process in started if process.status() != psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return []
