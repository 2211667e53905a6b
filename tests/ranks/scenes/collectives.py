"""Watches what is sent, and by whose code."""

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

import deepspeed
import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVES = [
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
]


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[str, str, int]]]:
    """Collects (caller's package, collective, largest tensor's elements)."""
    calls = []

    def watch(name, original):
        def call(*args, **kwargs):
            package = sys._getframe(1).f_globals["__name__"].split(".")[0]
            sizes = [a.numel() for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor)]
            calls.append((package, name, max(sizes, default=0)))
            return original(*args, **kwargs)

        return call

    backend = deepspeed.comm.comm.cdb  # keeps two of torch's functions from when it was made
    places = [(torch.distributed, name, name) for name in COLLECTIVES]
    places += [(backend, "reduce_scatter_function", "reduce_scatter_tensor")]
    places += [(backend, "all_gather_function", "all_gather_into_tensor")]
    with contextlib.ExitStack() as patches:
        for owner, attribute, name in places:
            replacement = watch(name, getattr(owner, attribute))
            patches.enter_context(mock.patch.object(owner, attribute, replacement))
        yield calls


class Recorded(TorchDispatchMode):
    """Collects (operator, largest tensor's elements) of every collective, in C++ too: DDP's reducer, DTensors.

    Attributes:
        calls: so far.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind not in (torch.Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # what a DTensor does in its turn is seen then
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            sizes = [leaf.numel() for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, torch.Tensor)]
            self.calls.append((func.overloadpacket.__name__, max(sizes, default=0)))
        return func(*args, **(kwargs or {}))

    def sums(self) -> list[int]:
        """Elements of each collective that adds anything up."""
        return [size for name, size in self.calls if "reduce" in name]
