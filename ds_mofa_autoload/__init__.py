"""A program that imports deepspeed finds MoFaSGD there, without a line of its own.

PyTorch calls :func:`install` at the end of ``import torch``: it is an entry point of the group ``torch.backends``. That
imports nothing. It leaves a finder behind, by which ds_mofa is imported once the program has imported deepspeed; a program
that never does is as it was. ``DS_MOFA_AUTOLOAD=0`` switches it off, ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` all entry points
of the group.

Only the standard library is imported here, and nothing is raised: ``import torch`` would fail with it.
"""

import importlib
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["SWITCH", "after_import", "install"]

SWITCH = "DS_MOFA_AUTOLOAD"

_executed: set[str] = set()  # modules of which a finder here has seen the end
_installed = False


def install() -> None:
    """Have ds_mofa imported after deepspeed; once a process, and never where :data:`SWITCH` is 0."""
    global _installed
    if not _installed and os.environ.get(SWITCH) != "0":
        _installed = True
        after_import("deepspeed", _import_ds_mofa)


def _import_ds_mofa() -> None:
    importlib.import_module("ds_mofa")


def after_import(name: str, then: Callable[[], None]) -> None:
    """Call ``then`` when the module ``name`` has been imported: now, if it has been.

    What ``then`` raises becomes a warning, for who imports that module has asked for nothing else.
    """
    module = sys.modules.get(name)
    if module is None:
        sys.meta_path.insert(0, _Finder(name, then))
    elif name in _executed or not _initializing(module):
        _call(name, then)
    else:  # it is being imported, and has imported us: no finder is asked for it any more
        _watch(module, name, then)


class _Finder:
    """Finds one module as the finders after this one do, and calls ``then`` when it has been executed.

    That somebody asks for its spec, as Accelerate does to learn whether it is installed, changes nothing.
    """

    def __init__(self, name: str, then: Callable[[], None]):
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            ask = getattr(finder, "find_spec", None)
            spec = ask(name, path, target) if ask is not None else None
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    self._follow(spec.loader)
                return spec
        return None

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _executed.add(self._name)
                _call(self._name, self._then)

        loader.exec_module = exec_module


def _initializing(module: types.ModuleType) -> bool:
    return bool(getattr(types.ModuleType.__getattribute__(module, "__spec__"), "_initializing", False))


def _watch(module: types.ModuleType, name: str, then: Callable[[], None]) -> None:
    """Until it has been imported, whoever asks it for an attribute has us look whether it has."""
    before = type(module)

    class Watched(before):  # type: ignore[misc, valid-type]
        def __getattribute__(self, attribute: str) -> Any:
            if not _initializing(self) and type(self) is Watched:
                types.ModuleType.__setattr__(self, "__class__", before)
                _call(name, then)
                return getattr(self, attribute)
            return super().__getattribute__(attribute)

    module.__class__ = Watched


def _call(name: str, then: Callable[[], None]) -> None:
    try:
        then()
    except Exception as error:
        version = getattr(sys.modules.get(name), "__version__", "of an unknown version")
        warnings.warn(
            f"ds_mofa could not be joined to {name} {version}, which does not know MoFaSGD therefore "
            f"({type(error).__name__}: {error}). {SWITCH}=0 leaves it out",
            stacklevel=2,
        )
