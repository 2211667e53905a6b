"""The two are joined without an import, whichever comes first; a program that wants neither pays nothing."""

import os
import subprocess
import sys
import warnings
from importlib import util
from pathlib import Path

import pytest

from ds_mofa.commands import running
from ds_mofa_autoload import SWITCH, after_import

ROOT = Path(__file__).resolve().parents[2]
KNOWN = "import deepspeed\nassert 'mofasgd' in deepspeed.runtime.config.DEEPSPEED_OPTIMIZERS, 'unknown'\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of a name of its own; returns the name."""
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)

    def write(name: str, source: str = "value = 1\n") -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.startswith("joined_")]:
        del sys.modules[name]


def run(tmp_path: Path, program: str, *before: str, **variables: str) -> subprocess.CompletedProcess:
    """A Python of its own, in which the entry point is installed as pip would."""
    metadata = tmp_path / "joined-1.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: joined\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\njoined = ds_mofa_autoload:install\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "DS_ACCELERATOR": "cpu"}
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, *before, "program.py"]
    return subprocess.run(
        command, cwd=tmp_path, env=environment | variables, capture_output=True, text=True, timeout=300
    )


def test_it_is_called_once_when_the_import_has_ended(module):
    name, called = module("joined_later"), []
    after_import(name, lambda: called.append(sys.modules[name].value))
    assert util.find_spec(name) is not None and called == []  # to ask for a spec is not to import
    __import__(name)
    assert called == [1] and not [finder for finder in sys.meta_path if getattr(finder, "_name", None) == name]
    after_import(name, lambda: called.append(2))
    assert called == [1, 2]


def test_two_that_wait_for_one_module_are_both_called(module):
    name, called = module("joined_twice"), []
    for number in (1, 2):
        after_import(name, lambda number=number: called.append(number))
    __import__(name)
    assert sorted(called) == [1, 2]


def test_a_module_that_is_being_imported_is_waited_for(module):
    """As deepspeed is, where a program imports it before torch."""
    called = []
    sys.modules["joined_called"] = type(sys)("joined_called")
    sys.modules["joined_called"].called = called
    source = (
        "from joined_called import called\nfrom ds_mofa_autoload import after_import\n"
        "after_import(__name__, lambda: called.append(whole))\nwhole = True\ndef late(): return called\n"
    )
    __import__(module("joined_first", source))
    first = sys.modules["joined_first"]
    assert called == []
    assert first.late() == [True] and type(first) is type(sys) and first.late() == [True]


def test_a_failure_is_a_warning(module):
    name = module("joined_failing")
    after_import(name, lambda: 1 // 0)
    with pytest.warns(UserWarning, match=f"could not be joined to {name} .*ZeroDivisionError.*{SWITCH}=0"):
        __import__(name)


def test_an_import_that_fails_calls_nothing(module):
    name, called = module("joined_broken", "raise ValueError('no')\n"), []
    after_import(name, lambda: called.append(1))
    with pytest.raises(ValueError, match="no"):
        __import__(name)
    assert called == []


def test_torch_brings_the_finder_and_nothing_else_and_deepspeed_the_rest(tmp_path):
    program = (
        "import sys, torch\n"
        "assert 'ds_mofa_autoload' in sys.modules\n"
        "assert not {'ds_mofa', 'deepspeed'} & sys.modules.keys()\n" + KNOWN
    )
    ran = run(tmp_path, program)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.slow  # as the one before, in other orders; the last one's first import of deepspeed is ds_mofa's
@pytest.mark.parametrize(
    "first", ["", "import deepspeed, ds_mofa\n", "import ds_mofa.backends.deepspeed.checkpoints\n"]
)
def test_deepspeed_is_joined_in_every_order(tmp_path, first):
    ran = run(tmp_path, first + KNOWN, "-W", "error::UserWarning")
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("variable", [SWITCH, "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_it_can_be_switched_off(tmp_path, variable):
    ran = run(tmp_path, KNOWN, **{variable: "0"})
    assert ran.returncode != 0 and "AssertionError: unknown" in ran.stderr


def test_run_joins_a_program_in_a_python_that_has_another_sitecustomize(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.theirs = True\n")
    (tmp_path / "program.py").write_text(
        "import sys\nassert theirs\n[finder] = [f for f in sys.meta_path if type(f).__module__ == 'ds_mofa_autoload']\n"
        "assert not {'torch', 'ds_mofa'} & sys.modules.keys()\nprint(finder._name)\n"
    )
    environment = running.environment({"PYTHONPATH": str(tmp_path), SWITCH: "0", "PATH": os.environ["PATH"]})
    assert SWITCH not in environment
    ran = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "deepspeed\n", ran.stderr


def test_nothing_is_said_where_all_is_well(module):
    name = module("joined_quiet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after_import(name, lambda: None)
        __import__(name)
