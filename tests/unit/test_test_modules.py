"""The tests' own rule: what two test modules share is in a module that is none."""

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def imported(path: Path) -> set[str]:
    """The modules that are imported anywhere in a file; of ``from a import b`` a and a.b, as b may be one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_module_imports_a_test_module():
    tests = {path.stem for path in TESTS.rglob("test_*.py")}
    assert len(tests) > 50
    for path in TESTS.rglob("*.py"):
        borrowed = [name for name in imported(path) if name.split(".")[-1] in tests]
        assert not borrowed, f"{path.relative_to(TESTS)} imports {', '.join(borrowed)}"
