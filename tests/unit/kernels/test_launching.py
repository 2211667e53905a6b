"""Which work the Triton kernels are launched for: tensors that are there, weights too, and nothing that is traced; and how."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_mofa import kernels
from ds_mofa.kernels._launching import Compiled
from ds_mofa.kernels.int8 import Int8Weight


@pytest.fixture(autouse=True)
def everything_is_on_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "triton_serves", lambda tensor: True)


def test_a_weight_is_a_tensor_that_is_there():
    weight = torch.randn(4, 32)
    assert kernels.launches_on(weight)
    assert kernels.launches_on(nn.Parameter(weight))
    assert kernels.launches_on(weight.requires_grad_())


def test_what_has_no_memory_of_its_own_is_not():
    with FakeTensorMode():
        fake = torch.empty(4, 32)
        assert not kernels.launches_on(fake)
        assert not kernels.launches_on(nn.Parameter(fake))
    assert not kernels.launches_on(Int8Weight.of(torch.randn(4, 32)))


def test_what_is_compiled_is_not(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not kernels.launches_on(torch.randn(4, 32))


class Kernel:
    """Notes its launches as Triton's kernels and what they compile to would take them."""

    arg_names = ("table", "tokens", "RANK", "BLOCK")

    def __init__(self, compiles: bool = True):
        self.compiles, self.launches = compiles, []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append(("kernel", grid, args, constants))
            return Handle(self.launches) if self.compiles else None

        return launch


class Handle:
    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args: self.launches.append(("compiled", grid, args))


def test_a_kernel_is_asked_for_once():
    """Then what it compiled to is launched, with the constants in the order of the kernel's arguments."""
    kernel = Kernel()
    launch = Compiled(kernel, BLOCK=64, RANK=8, num_warps=4)
    for tokens in (10, 20):
        launch((2, tokens), "table", tokens)
    assert kernel.launches == [
        ("kernel", (2, 10), ("table", 10), {"BLOCK": 64, "RANK": 8, "num_warps": 4}),
        ("compiled", (2, 20, 1), ("table", 20, 8, 64)),
    ]


def test_the_interpreter_compiles_nothing():
    kernel = Kernel(compiles=False)
    launch = Compiled(kernel, BLOCK=64, RANK=8)
    for tokens in (10, 20):
        launch((2, tokens), "table", tokens)
    assert [kind for kind, *_ in kernel.launches] == ["kernel"] * 2


@pytest.fixture
def entered(monkeypatch):
    """The devices that became the current one, where that is cuda:0."""
    devices = []

    @contextlib.contextmanager
    def device(one):
        devices.append(one)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def test_a_launch_is_on_the_device_of_its_tensors(entered):
    for name in ("cpu", "cuda:0"):
        with kernels.on(torch.device(name)):
            assert entered == []
    with kernels.on(torch.device("cuda:1")):
        assert entered == [torch.device("cuda:1")]


def test_the_first_tensor_says_where(entered):
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda:2")

    def launch(shards, U, *, scale):
        """What it does."""
        return shards, scale, list(entered)

    launched = kernels.on_its_device(launch)
    U = torch.zeros(2).as_subclass(Elsewhere)
    assert launched(["shards"], U, scale=3) == (["shards"], 3, [torch.device("cuda:2")])
    assert launched.__doc__ == launch.__doc__


def test_every_launch_is_on_its_tensors_device():
    """By the source: what launches a kernel is within :func:`on`, or decorated."""
    launches = 0
    for path in Path(kernels.__file__).parent.glob("_*.py"):
        tree = ast.parse(path.read_text())
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            calls = [
                node
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Subscript)
                and ast.unparse(node.func.value).endswith("_kernel")
            ]
            launches += len(calls)
            decorated = "on_its_device" in map(ast.unparse, function.decorator_list)
            assert not calls or decorated or function.name in ("_on_device", "_warm"), f"{path.name}: {function.name}"
    assert launches >= 12
    capture = ast.parse((Path(kernels.__file__).parent / "_capture.py").read_text())
    within = [
        node for node in ast.walk(capture) if isinstance(node, ast.With) and "on(device)" in ast.unparse(node.items)
    ]
    calls = {ast.unparse(node.func) for node in ast.walk(within[0]) if isinstance(node, ast.Call)}
    assert {"project", "accumulate", "_on_device"} <= calls
