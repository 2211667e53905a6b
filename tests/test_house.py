"""The house keeps its order: who imports whom, the pinned rules of ruff, no import that hides inside a function.

The rules themselves are in pyproject.toml; `make lint` runs them with the types and the formatting as well.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ds_mofa", "launch", "profiling", "experiments")

# What may be imported inside a function, and why it is not at the top of its file.
HIDDEN = {
    "deepspeed": "a plain loop does without it",
    "ds_mofa.backends.deepspeed": "imports deepspeed",
    "profiling.deepspeed_trainer": "imports deepspeed",
    "torch.testing": "makes a pretended backend known, which a prediction alone wants",
    "transformers": "an extra",
    "trl": "an extra",
    "datasets": "an extra, which a .parquet file alone needs",
    "pyarrow": "likewise",
    "peft": "an extra",
    "torchao": "an extra",
    "liger_kernel": "an extra",
    "matplotlib": "an extra",
    "pynvml": "a machine without NVIDIA's driver does without it",
    "triton": "there is none without a GPU",
    "ds_mofa.kernels": "its files that begin with an underscore import triton",
    "ds_mofa.profiler.measure.callback": "imports transformers",
    "torch._dynamo": "takes a second to import, and only a compiled step needs it",
}
# Files that must run before torch is imported.
BEFORE_TORCH = {"isolation.py"}


def tool(name: str) -> str:
    """The path of a command of the environment."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed: pip install -e '.[lint]'")
    return found


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def hidden_imports(source: str) -> list[tuple[int, str]]:
    """Line and name of every module that is imported inside a function."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found.append((node.lineno, "." * node.level + (node.module or "")))
    return sorted(set(found))


def is_allowed(module: str, file: str) -> bool:
    names = [*HIDDEN, *(["torch"] if file in BEFORE_TORCH else [])]
    return any(module == name or module.startswith(f"{name}.") for name in names)


def test_imports_run_down_only():
    checked = run(tool("lint-imports"), "--no-cache")
    assert checked.returncode == 0, checked.stdout


def test_ruff_finds_nothing():
    checked = run(tool("ruff"), "check", "--no-cache", "--output-format", "concise", ".")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_no_import_hides_inside_a_function():
    hidden = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, module in hidden_imports(path.read_text())
        if not is_allowed(module, path.name)
    ]
    assert hidden == []


def test_a_hidden_import_is_found():
    source = (
        "import os\ndef f():\n    def g():\n        from ds_mofa.step.step import x\n    import torch.nn, trl.data\n"
    )
    assert hidden_imports(source) == [(4, "ds_mofa.step.step"), (5, "torch.nn"), (5, "trl.data")]
    assert is_allowed("trl.data", "a.py") and not is_allowed("torch.nn", "a.py") and not is_allowed("trlx", "a.py")


def test_there_is_one_version():
    """pyproject takes it from the package, as text: building a wheel imports nothing."""
    lines = (ROOT / "ds_mofa/__init__.py").read_text().splitlines()
    assert sum(line.startswith("__version__ = ") for line in lines) == 1
    project = (ROOT / "pyproject.toml").read_text()
    assert 'version.attr = "ds_mofa.__version__"' in project and "\nversion = " not in project
