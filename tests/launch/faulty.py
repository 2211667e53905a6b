"""launch/train.py, with one rank that dies or is told to stop where ``--fault`` says: PLACE:NUMBER:RANK.

step:5:1          rank 1 is killed in the update of this run's 5th step
save:2:0          rank 0 is killed half way through the file that it writes for this run's 2nd checkpoint
resume:1:0        rank 0 is killed while the engine loads a checkpoint
sigterm:3:1       rank 1 gets SIGTERM in the 3rd step
sigterm-all:3:0   the launcher gets SIGTERM, which it passes on
sigterm-eval:3:1  rank 1 gets SIGTERM in this run's 3rd batch of evaluations
sigterm-model:1:0 rank 0 gets SIGTERM while it writes the final model
"""

import io
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
at = sys.argv.index("--fault")
place, number, rank = sys.argv[at + 1].split(":")
del sys.argv[at : at + 2]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: type, name: str, fault) -> None:
    """Have ``fault`` happen before the ``number``th call of a method, on the rank."""
    original, calls = getattr(owner, name), []

    def method(*args, **kwargs):
        calls.append(1)
        if len(calls) == int(number) and os.environ.get("RANK", "0") == rank:
            fault()
        return original(*args, **kwargs)

    setattr(owner, name, method)


def die_in_the_next_file() -> None:
    import torch

    save = torch.save

    def half(what, file, *args, **kwargs):
        whole = io.BytesIO()
        save(what, whole)
        Path(getattr(file, "name", file)).write_bytes(whole.getvalue()[: whole.tell() // 2])
        die()

    torch.save = half


def arrange() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_mofa.step.step import MatrixStep

    if place == "step":
        before(MatrixStep, "update", die)
    elif place == "save":
        before(DeepSpeedEngine, "save_checkpoint", die_in_the_next_file)
    elif place == "resume":
        before(DeepSpeedEngine, "load_module_state_dict", die)
    elif place == "sigterm-eval":
        from launch.trainer import FineTuner

        before(FineTuner, "prediction_step", lambda: os.kill(os.getpid(), signal.SIGTERM))
    elif place == "sigterm-model":
        from launch.trainer import FineTuner

        before(FineTuner, "_save", lambda: os.kill(os.getpid(), signal.SIGTERM))
    else:
        whom = os.getppid() if place == "sigterm-all" else os.getpid()
        before(MatrixStep, "update", lambda: os.kill(whom, signal.SIGTERM))


if __name__ == "__main__":
    from launch.train import main

    arrange()
    main(sys.argv[1:])
