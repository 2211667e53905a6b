"""SIGTERM, which machines that are taken back send some seconds before: save where the run stands, and stop."""

import os
import signal
import socket
import threading
from pathlib import Path

import psutil
import torch
from torch import distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launch.launcher import lives

EXIT_CODE = 128 + signal.SIGTERM  # as a shell reports a process that SIGTERM has ended


class Stopped(Exception):
    """SIGTERM was seen in an evaluation, whose rest there may be no time for."""


class SaveOnSigterm(TrainerCallback):
    """From its construction on, SIGTERM to any rank makes all of them save a checkpoint, and stop.

    The ranks agree at the end of each step, save and batch of an evaluation, by an all-reduce of one number on the CPU,
    which waits for no GPU. In an evaluation all of them raise :class:`Stopped`.

    A launcher also sends SIGTERM to the ranks that are left when one has died. They may be waiting for that one, and
    have nothing to save: such a rank ends at once, or the launcher would wait 30 s for each of them in turn.

    Attributes:
        stopped: whether the training, or an evaluation, has been stopped, on every rank.
    """

    def __init__(self):
        self.stopped = False
        self._asked = False
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._group = None if alone else dist.new_group(backend="gloo")
        self._ranks = _ranks_here(self._group)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        # A handler runs between two lines of Python, and this process may be deep in a collective: a thread reads of
        # the signal as well.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._sockets = reader, writer
        threading.Thread(target=self._leave_the_dead, args=(reader,), daemon=True).start()

    def asked(self) -> bool:
        """Whether any rank has had SIGTERM. Collective."""
        asked = torch.tensor([self._asked], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.asked():
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may not be the time

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.asked():  # in the save, which the next step would only repeat
            self.stopped = control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.stopped:  # HF goes on to what is due at an epoch's end
            control.should_evaluate = control.should_save = False

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.asked():
            self.stopped = True
            raise Stopped

    def _on_sigterm(self, *_) -> None:
        self._asked = True

    def _leave_the_dead(self, signals: socket.socket) -> None:
        while number := signals.recv(1):
            if number[0] == signal.SIGTERM and not all(map(lives, self._ranks)):
                os._exit(EXIT_CODE)


def _ranks_here(group: dist.ProcessGroup | None) -> list[psutil.Process | None]:
    """The processes of the other ranks on this machine, None for one that has gone. Collective.

    Not the launcher's children: instead of a launcher there may be a shell, or a container's first process, with
    others that come and go.
    """
    if group is None:
        return []
    mine = _machine(), os.getpid()
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine, group=group)
    return [_process(pid) for machine, pid in found if machine == mine[0] and pid != mine[1]]


def _machine() -> tuple[str, ...]:
    """What two processes have in common that see each other by their ids."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return (socket.gethostname(),)


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None
