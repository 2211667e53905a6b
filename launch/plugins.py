"""``--plugins``: modules of the user's own that are imported first, and register optimizers there.

They are read before all other arguments: a config may name what they register (:mod:`ds_mofa.optimizers.registry`).
"""

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

from launch.errors import UserError

__all__ = ["import_plugins"]


def import_plugins(argv: list[str]) -> None:
    """Import what the command line names: Python files, or modules by their dotted names.

    Raises:
        UserError: there is no such file or module, or importing it fails; it says why.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugins", nargs="+", default=[])
    for plugin in parser.parse_known_args(argv)[0].plugins:
        try:
            if plugin.endswith(".py"):
                _import_file(Path(plugin))
            else:
                importlib.import_module(plugin)
        except Exception as error:  # whatever the user's own code may raise
            raise UserError(
                f"--plugins {plugin}: it could not be imported ({type(error).__name__}: {error}). Give a Python file, "
                "or a module that is installed or on PYTHONPATH."
            ) from error


def _import_file(path: Path) -> None:
    """As a module of the file's name, once."""
    name = path.stem
    if name in sys.modules:
        if getattr(sys.modules[name], "__file__", None) == str(path.resolve()):
            return
        raise ImportError(f"there is another module {name!r} already: rename the file")
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None  # of a path that ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
