"""Where the programs of other people are installed: in the environment of the tests, or in one that a variable names."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["Home", "home_of"]


@dataclasses.dataclass(frozen=True)
class Home:
    """An environment, and what a process there sees: CPU ranks, no network, and our package by ``PYTHONPATH``."""

    bin: Path
    environment: dict[str, str]

    def command(self, name: str) -> str:
        return str(self.bin / name)

    def folder_of(self, package: str) -> Path:
        """Of an installed package; skips the test where it is not."""
        find = f"import importlib.util; print(importlib.util.find_spec({package!r}).submodule_search_locations[0])"
        found = subprocess.run([self.bin / "python", "-c", find], env=self.environment, capture_output=True, text=True)
        if found.returncode != 0:
            pytest.skip(f"{package} is not installed; {_variable(package)} may name the venv that has it")
        return Path(found.stdout.strip())


def home_of(package: str, ours: Path, **variables: str) -> Home:
    """The environment that ``DS_MOFA_<PACKAGE>`` names, or else that of the tests; skips the test without the package.

    Args:
        ours: the folder that ds_mofa lies in.
        **variables: what else is set there.
    """
    named = os.environ.get(_variable(package))
    folder = Path(named) if named else Path(sys.executable).parents[1]
    environment = os.environ | {
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": str(ours),
        "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        **variables,
    }  # fmt: skip
    if named:  # what DeepSpeed compiles is of its version
        environment["TORCH_EXTENSIONS_DIR"] = str(folder / "torch_extensions")
    home = Home(folder / "bin", environment)
    home.folder_of(package)
    return home


def _variable(package: str) -> str:
    return f"DS_MOFA_{package.upper()}"
