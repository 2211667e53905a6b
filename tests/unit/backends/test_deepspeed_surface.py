"""The table of what this package relies on in DeepSpeed, against the installed DeepSpeed and against the package itself.

Everything is read from sources: decorators hide the signatures of some of DeepSpeed's methods, and the package's own
stand over others.
"""

import ast
import functools
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import deepspeed
import pytest

from ds_mofa.backends.deepspeed import registration, surface
from ds_mofa.backends.deepspeed.replicated import Bf16ReplicatedMixin
from ds_mofa.backends.deepspeed.surface import ROWS, Row
from ds_mofa.backends.deepspeed.zero import Bf16Mixin, Stage3Mixin, Stage12Mixin

ROOT = Path(__file__).resolve().parents[3]
MIXINS = [
    (Stage12Mixin, surface.STAGE_1_2),
    (Stage3Mixin, surface.STAGE_3),
    (Bf16Mixin, surface.BF16),
    (Bf16ReplicatedMixin, surface.FUSED),
    (Bf16ReplicatedMixin, surface.UNFUSED),
]
VERSIONS = ["0.18.6", "0.19.0", "0.19.2", "0.19.7", "0.19.8"]
TORCH_S = {"_opt_called", "_parameters"}  # private names of torch's, which are not what this table is about


# ---------------------------------------------------------------------- what DeepSpeed has


def problems(rows: Iterable[Row]) -> list[str]:
    """A line for each row that the installed DeepSpeed does not fit: what it has there, and what that is needed for."""
    lines = []
    for row in rows:
        if not row.is_expected(deepspeed.__version__):
            continue
        forms = forms_of(row)
        if row.form not in forms:
            what = f"is now {forms[0]} and was {row.form}" if forms else "is gone"
            lines.append(f"{row.owner}.{row.name} {what}; ds_mofa {row.use} it: {row.why}")
    return lines


def forms_of(row: Row) -> list[str]:
    """What DeepSpeed has under a row's name, in the words of the table; of a class also what its bases have."""
    owner = resolved(row.owner)
    if isinstance(owner, ModuleType):
        return list(in_module(owner, row.name))
    bases = owner.__mro__[:-1] if owner is not None else ()
    return [form for base in bases for form in in_class(base).get(row.name, [])]


@functools.cache
def in_class(cls: type) -> dict[str, list[str]]:
    """{name: forms} of its functions and properties, and of what they set on ``self``."""
    forms = defaultdict(list)
    for definition in definitions(inspect.getmodule(cls), ast.ClassDef, cls.__name__):
        for node in definition.body:
            if isinstance(node, ast.FunctionDef):
                is_property = any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)
                forms[node.name].append("property" if is_property else signature(node))
            elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("property("):
                forms[node.targets[0].id].append("property")
        for node in ast.walk(definition):
            on_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            if on_self and isinstance(node.ctx, ast.Store):
                forms[node.attr].append("attribute")
    return forms


def in_module(module: ModuleType, name: str) -> Iterator[str]:
    """A function of it, a name that its functions call, an attribute that they ask of any object."""
    for function in definitions(module, ast.FunctionDef, name):
        yield signature(function)
    source = inspect.getsource(module)
    if re.search(rf"(?<![\w.]){name}\(", source):
        yield "name"
    if re.search(rf"\.{name}\b|([\"']){name}\1", source):  # in quotes: getattr's
        yield "attribute"


def definitions(module: ModuleType, kind: type, name: str) -> list:
    return [node for node in tree(module).body if isinstance(node, kind) and node.name == name]


def signature(function: ast.FunctionDef) -> str:
    """Without annotations."""
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(function.args)})"


@functools.cache
def resolved(dotted: str) -> ModuleType | type | None:
    try:
        return importlib.import_module(dotted)
    except ImportError:
        module, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(module), name, None)


@functools.cache
def tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def test_deepspeed_has_everything_in_the_table():
    assert not problems(ROWS), "\n".join(problems(ROWS))


@pytest.mark.parametrize(
    ("owner", "name", "form", "said"),
    [
        (
            surface.ENGINE,
            "_configure_optimizer",
            "(self, client_optimizer)",
            "is now (self, client_optimizer, model_par",
        ),
        (surface.ENGINE, "_no_such_method", "(self)", "is gone"),
        (surface.ENGINE, "_no_such_attribute", "attribute", "is gone"),
        (surface.STAGE_3, "_post_step", "(self)", "is now (self, timer_names)"),  # a decorator hides it at run time
        (surface.STAGE_3, "param_groups", "attribute", "is now property"),
        ("deepspeed.runtime.engine.NoSuchClass", "step", "(self)", "is gone"),
        ("deepspeed.runtime.engine", "no_such_function", "name", "is gone"),
        ("deepspeed.checkpoint.ds_to_universal", "_get_optim_files", "(folder)", "is now (checkpoint_dir)"),
        (surface.PARTITION, "ds_no_such", "attribute", "is gone"),
    ],
)
def test_what_has_changed_is_named(owner, name, form, said):
    [line] = problems([Row(owner, name, "calls", form, "a control")])
    assert line.startswith(f"{owner}.{name} ") and said in line and line.endswith("ds_mofa calls it: a control")


# ---------------------------------------------------------------------- what the package uses


def parsed(*folders: str) -> dict[str, ast.Module]:
    """The files that DeepSpeed is named in."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    return {file: ast.parse(text) for file, text in texts.items() if "deepspeed" in text}


def private_names(trees: dict[str, ast.Module], own: set[str]) -> dict[str, str]:
    """{name: file} of what is asked of objects and begins with an underscore or "ds_", without what is in ``own``."""
    used = {}
    for file, whole in trees.items():
        for node in ast.walk(whole):
            if isinstance(node, ast.Attribute):
                name = node.attr
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
                name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            else:
                continue
            ours = name.startswith(("__", "ds_mofa")) or name in own | TORCH_S
            if name.startswith(("_", "ds_")) and not ours:
                used[name] = file
    return used


def defined(trees: Iterable[ast.Module]) -> set[str]:
    """Names that functions, classes and assignments give."""
    names = set()
    for node in (node for whole in trees for node in ast.walk(whole)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def test_a_row_holds_for_its_versions_alone():
    row = Row(surface.ENGINE, "_no_such_method", "calls", "(self)", "a control", since="99.0")
    assert problems([row]) == [] and problems([row._replace(since="", until="0.1")]) == []
    assert len(problems([row._replace(since="0.1", until="99.0")])) == 1
    assert row._replace(since="0.19.8").is_expected("0.19.8+cu13") and row._replace(
        since="", until="0.19.3"
    ).is_expected("0.19.2")


def test_private_names_of_deepspeed_are_all_in_the_table():
    backend = parsed("ds_mofa/backends/deepspeed")
    names = {row.name for row in ROWS}
    missing = {
        name: file for name, file in private_names(backend, defined(backend.values())).items() if name not in names
    }
    assert not missing, f"private names that are not in ds_mofa/backends/deepspeed/surface.py: {missing}"


def imported(trees: dict[str, ast.Module]) -> dict[str, str]:
    """{name: file} of what is imported from DeepSpeed, or asked of a module of it, and begins with an underscore."""
    found = {}
    for file, whole in trees.items():
        modules = {"deepspeed"}
        for node in ast.walk(whole):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
                modules |= {alias.asname or alias.name for alias in node.names}
                found |= {alias.name: file for alias in node.names if alias.name.startswith("_")}
            elif isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and root_of(node) in modules:
                found[node.attr] = file
    return found


def root_of(node: ast.expr) -> str | None:
    """a of a.b.c."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def test_nothing_private_is_imported_past_the_table():
    everywhere = imported(parsed("ds_mofa", "launch", "profiling"))
    assert everywhere.keys() <= {row.name for row in ROWS}, everywhere


def test_every_wrapped_method_is_in_the_table_and_no_other():
    whole = ast.parse(inspect.getsource(registration))
    calls = [node for node in ast.walk(whole) if isinstance(node, ast.Call) and ast.unparse(node.func) == "_wrap"]
    wrapped = [call.args[0].value for call in calls]
    listed = {row.name for row in ROWS if row.owner == surface.ENGINE and row.use == "wraps"}
    assert sorted(wrapped) == sorted(listed)


@pytest.mark.parametrize(("mixin", "owner"), MIXINS, ids=[f"{mixin.__name__}-{owner}" for mixin, owner in MIXINS])
def test_what_a_mixin_overrides_and_asks_of_its_base_is_in_the_table(mixin, owner):
    theirs = resolved(owner)
    listed = {row.name for row in ROWS if row.owner == owner}
    overrides = {
        row.name
        for row in ROWS
        if row.owner == owner and row.use == "overrides" and row.is_expected(deepspeed.__version__)
    }
    ours = [base for base in mixin.__mro__ if base.__module__.startswith("ds_mofa")]
    own = {name for base in ours for name in vars(base) if not name.startswith("__")}
    overridden = {name for name in own if hasattr(theirs, name)}
    assert overridden == overrides
    trees = [ast.parse(inspect.getsource(base)) for base in ours]
    asked = {name for whole in trees for name in asked_of_self(whole)}
    asked -= defined(trees) | ({"loss_scale"} if owner == surface.BF16 else set())  # which has none, and is not asked
    assert asked <= listed, asked - listed


def asked_of_self(whole: ast.Module) -> Iterator[str]:
    for node in ast.walk(whole):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()"):
            yield node.attr


def test_the_scan_sees_a_name_that_is_not_in_the_table():
    code = "from deepspeed.runtime import _private\nengine._unlisted()\ngetattr(param, 'ds_unlisted')\nself._own = 1"
    whole = {"a.py": ast.parse(code)}
    assert private_names(whole, defined(whole.values())) == {"_unlisted": "a.py", "ds_unlisted": "a.py"}
    assert imported(whole) == {"_private": "a.py"}


def test_no_row_is_there_twice():
    places = [(row.owner, row.name, version) for row in ROWS for version in VERSIONS if row.is_expected(version)]
    assert len(places) == len(set(places))
