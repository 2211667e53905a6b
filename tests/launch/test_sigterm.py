"""SIGTERM to the process that a user, a scheduler or a container has started, and to that one alone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from ds_mofa.commands import ranks
from launch import launcher
from tests.launch.commands import ROOT, command_environment, make_inputs
from tests.ports import free_port

CONFIG = str(ROOT / "configs/zero2_mofasgd.json")
PID_1 = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
RANK = """
import os, signal, sys, time
rank, fault = int(os.environ["RANK"]), sys.argv[1]
assert os.environ["WORLD_SIZE"] == "2" and os.environ["LOCAL_RANK"] == os.environ["RANK"]
if fault == "saves":
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), open(f"saved{rank}", "w").close(), os._exit(143)))
if fault == "fails" and rank == 1:
    sys.exit(7)
if fault == "fails-asked":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143 if rank else 9))
open(f"ready{rank}", "w").close()
if fault != "ends":
    time.sleep(600)
"""
# By its path: the package would import torch, which takes seconds.
START = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("ranks", sys.argv[1])
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)
sys.exit(ranks.run([sys.executable, "rank.py", sys.argv[2]], 2))
"""


def until(happened, process: subprocess.Popen | None = None, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("fault", "status"), [("ends", 0), ("fails", 7), ("saves", 143), ("fails-asked", 9), ("no", 143)]
)
def test_the_status_is_that_of_the_ranks(tmp_path, fault, status):
    (tmp_path / "rank.py").write_text(RANK)
    process = subprocess.Popen([sys.executable, "-c", START, ranks.__file__, fault], cwd=tmp_path)
    if fault not in ("ends", "fails"):
        until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), process)
        process.terminate()
    assert process.wait(timeout=120) == status
    assert [(tmp_path / f"saved{rank}").exists() for rank in (0, 1)] == [fault == "saves"] * 2


def fake(*commands: str, parent: "Fake | None" = None) -> "Fake":
    return Fake(list(commands), parent)


class Fake:
    def __init__(self, words: list[str], above: "Fake | None"):
        self._words, self._above = words, above

    def cmdline(self) -> list[str]:
        return self._words

    def parent(self) -> "Fake | None":
        return self._above


def test_the_command_is_known_by_its_launcher():
    shell = fake("bash", "deepspeed.sh")
    command = fake("python", "/venv/bin/deepspeed", "launch/train.py", parent=shell)
    started = fake("python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30", parent=command)
    assert launcher.command_of(fake("python", "launch/train.py", parent=started)) is command
    for above in (fake("sshd"), shell, None):  # on another machine, or an orphan
        remote = fake("python", "-m", "deepspeed.launcher.launch", parent=above)
        assert launcher.command_of(fake("python", parent=remote)) is None
    assert launcher.command_of(fake("python", parent=command)) is None


def test_a_process_that_has_ended_does_not_live():
    process = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    found = psutil.Process(process.pid)
    assert launcher.lives(psutil.Process()) and not launcher.lives(None)
    until(lambda: not launcher.lives(found))  # a zombie: nobody has asked for its status
    process.communicate()
    assert not launcher.lives(found)


# ---------------------------------------------------------------------- the real commands


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["deepspeed", "--num_gpus", "2", "--master_port", "PORT", "launch/train.py"], -signal.SIGTERM),
        ([sys.executable, "-m", "ds_mofa", "train", "--gpus", "2"], ranks.ENDED),
        ([*PID_1, sys.executable, "-m", "ds_mofa", "train", "--gpus", "2"], ranks.ENDED),
    ],
    ids=["deepspeed", "ds-mofa", "ds-mofa as process 1"],
)
def test_all_ranks_save_and_end(tmp_path, started, command, status):
    if command[0] == "unshare" and (
        shutil.which("unshare") is None or subprocess.run([*PID_1, "true"], capture_output=True).returncode
    ):
        pytest.skip("this machine lets nobody make a process 1")
    make_inputs(tmp_path)
    command = [str(free_port()) if word == "PORT" else word for word in command]
    command = [str(ROOT / word) if word == "launch/train.py" else word for word in command]
    command += ["--deepspeed", CONFIG, "--model_config", "shape.json", "--train_file", "train.txt"]
    command += ["--max_length", "64", "--per_device_train_batch_size", "2", "--max_steps", "100000"]
    command += ["--save_strategy", "steps", "--save_steps", "2", "--output_dir", "out"]
    environment = command_environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    started.append(process)
    out = tmp_path / "out"
    until(lambda: (out / "checkpoint-4/complete.json").exists(), process)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 2
    # unshare is not process 1 of its container: its child is.
    os.kill(below[0].pid if command[0] == "unshare" else process.pid, signal.SIGTERM)
    assert process.wait(timeout=300) == status
    until(lambda: not any(map(launcher.lives, below)))
    said = (tmp_path / "log.txt").read_text()
    assert said.count("stopped by SIGTERM, saved out/checkpoint-") == 1
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert (last / "complete.json").is_file()
    if status == ranks.ENDED:
        assert "Traceback" not in said
