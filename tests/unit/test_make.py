"""`make test`: both halves run and are told of, whatever the first one says."""

import functools
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# In the place of the environment's python: notes what it is asked for, and ends as it is told for each half.
PYTHON = """#!/bin/bash
echo "$*" >> "$ASKED"
[ "$WITHOUT" != interrupted ] || { kill -INT $PPID; exit 2; }
case "$*" in
  *"--ignore tests/ranks"*) exit "$WITHOUT" ;;
  "-m pytest tests/ranks") exit "$RANKS" ;;
esac
exit 99
"""

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def make(
    folder: Path, target: str, without: int | str = 0, ranks: int = 0, compiled: bool = True
) -> tuple[int, list[str], list[str]]:
    """The exit status, what was printed, and what python was called with."""
    venv, asked = folder / "venv", folder / "asked"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text(PYTHON)
    (venv / "bin/python").chmod(0o755)
    (venv / ".installed").touch()  # newer than what it is made from, and so is what comes next
    (venv / "torchao").mkdir()
    (venv / "torch_extensions").mkdir()
    if compiled:
        (venv / "torch_extensions/.compiled").touch()
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    environment |= {"ASKED": str(asked), "WITHOUT": str(without), "RANKS": str(ranks)}
    command = ["make", "-C", str(ROOT), f"VENV={venv}", target]
    # Whoever runs the tests in the background ignores SIGINT, which children inherit and a shell cannot trap.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, preexec_fn=listening)
    lines = [line for line in run.stdout.splitlines() if not line.startswith("make")]
    return run.returncode, lines, asked.read_text().splitlines()


@pytest.mark.parametrize(
    "without, ranks, said",
    [
        (0, 0, ["tests without ranks: passed", "tests on ranks: passed"]),
        (1, 0, ["tests without ranks: FAILED, pytest exit 1", "tests on ranks: passed"]),
        (0, 1, ["tests without ranks: passed", "tests on ranks: FAILED, pytest exit 1"]),
        (2, 5, ["tests without ranks: FAILED, pytest exit 2", "tests on ranks: FAILED, no test was collected"]),
        (5, 0, ["tests without ranks: FAILED, no test was collected", "tests on ranks: passed"]),
    ],
)
def test_both_halves_run_and_the_last_lines_say_how_they_ended(tmp_path, without, ranks, said):
    status, printed, asked = make(tmp_path, "test", without, ranks)
    assert len(asked) == 2 and asked[1] == "-m pytest tests/ranks"
    assert printed[-2:] == said
    assert (status == 0) == (without == ranks == 0)


def test_stopped_by_hand_it_does_not_go_on_with_the_other_half(tmp_path):
    status, printed, asked = make(tmp_path, "test", "interrupted")
    assert status != 0 and len(asked) == 1 and printed == []


def test_deepspeeds_operators_are_compiled_before_the_tests_which_run_even_if_that_fails(tmp_path):
    status, printed, asked = make(tmp_path, "test", compiled=False)
    assert asked[0] == "tests/compile_operators.py" and len(asked) == 3  # the stand-in ends with 99
    assert status == 0 and "DeepSpeed's operators were not compiled" in printed
    assert not (tmp_path / "venv/torch_extensions/.compiled").exists()


def test_the_fast_ones_are_those_of_the_parts(tmp_path):
    status, _, asked = make(tmp_path, "test-fast")
    assert (
        status != 0 and len(asked) == 1 and asked[0].endswith(" tests/unit tests/extending")
    )  # the stand-in ends with 99


def test_help_names_every_target_that_runs_tests():
    printed = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, timeout=60).stdout
    assert all(f"make {name}" in printed for name in ("test ", "test-fast", "test-slow", "test-gpu", "test-long"))


def test_continuous_integration_runs_what_make_test_does():
    assert "exec make test" in (ROOT / ".ci/run").read_text()
