"""``ds-mofa run CMD ...``: run a program, and all that it starts in Python, with MoFaSGD known to DeepSpeed.

For programs that nobody edits. Where the package is installed they need no such help (:mod:`ds_mofa_autoload`); this is for
a clone that is not, and where that was switched off. Python finds a sitecustomize on PYTHONPATH, which a launcher hands on
to its ranks, DeepSpeed's to other machines too.
"""

import os
import sys
from pathlib import Path

import ds_mofa_autoload

__all__ = ["environment", "main"]

_USAGE = "usage: ds-mofa run CMD ..., such as: ds-mofa run llamafactory-cli train lora.yaml; a .py file is run by this Python"


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return
    command = [sys.executable, *argv] if argv[0].endswith(".py") else argv
    try:
        os.execvpe(command[0], command, environment(os.environ))
    except OSError as error:
        sys.exit(f"ds-mofa run: error: {command[0]}: {error.strerror}")


def environment(given: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    """The variables of ``given`` with which Python joins the two."""
    site = Path(ds_mofa_autoload.__file__).resolve().parent / "site"
    paths = os.pathsep.join([str(site), *filter(None, [given.get("PYTHONPATH")])])
    return {name: value for name, value in given.items() if name != ds_mofa_autoload.SWITCH} | {"PYTHONPATH": paths}
