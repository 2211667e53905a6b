"""The command ``ds-mofa``.

``ds-mofa report`` is in :mod:`ds_mofa.profiler.report`; the others are here:

split.py      which parameters of a model are matrices, and the memory that it takes
scripts.py    train, predict, verify: the scripts of launch/ and profiling/, from a clone or from where they are installed
ranks.py      how ``ds-mofa train`` starts ranks, and what it does with SIGTERM
shipped.py    the configs and model shapes that come with the package, by name
running.py    ``ds-mofa run CMD``: any program, with MoFaSGD known to DeepSpeed
"""

import sys
from collections.abc import Callable, Sequence

from ds_mofa.commands import running, scripts, shipped, split
from ds_mofa.profiler.report import command

__all__ = ["COMMANDS", "main"]

# What each does, and the function that takes the words after its name and returns an exit status, or None for 0.
COMMANDS: dict[str, tuple[str, Callable[[list[str]], int | None]]] = {
    "train": ("fine-tune a model on your data, on the GPUs there are", scripts.train),
    "predict": ("the memory that a training run will take, without a GPU", scripts.predict),
    "split": ("which parameters of a model are matrices, and what it takes", split.main),
    "report": ("pages of what runs took, side by side, and what differs between two", command.main),
    "verify": ("measure AdamW, MoFaSGD and LoRA in the paper's setting", scripts.verify),
    "config": ("print a config or a model shape that comes with the package", shipped.main),
    "run": ("run any program with MoFaSGD known to DeepSpeed", running.main),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of :data:`COMMANDS`; exits with its status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    if words[0] not in COMMANDS:
        sys.exit(f"ds-mofa: error: no command {words[0]!r}\n{usage()}")
    status = COMMANDS[words[0]][1](words[1:])
    if status:
        sys.exit(status)


def usage() -> str:
    rows = [f"  {name:<8} {what}" for name, (what, _) in COMMANDS.items()]
    return "\n".join(["usage: ds-mofa COMMAND ...; ds-mofa COMMAND --help says more", *rows])
