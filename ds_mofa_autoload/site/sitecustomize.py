"""Python imports this at its start where ``python -m ds_mofa run`` has put its folder on PYTHONPATH."""

import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))

# The environment's own, in whose place Python has found this one.
_own = importlib.machinery.PathFinder.find_spec(
    "sitecustomize", [path for path in sys.path if os.path.abspath(path) != _here]
)
if _own is not None and _own.loader is not None:
    _own.loader.exec_module(importlib.util.module_from_spec(_own))

if importlib.util.find_spec("ds_mofa_autoload") is None:  # a clone that is not installed
    sys.path.append(os.path.dirname(os.path.dirname(_here)))

import ds_mofa_autoload  # noqa: E402

ds_mofa_autoload.install()
