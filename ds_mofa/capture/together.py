"""Within ``torch.compile``: one call for the sketches of a layer's linears, where each would cost the host its own."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ds_mofa.capture import compiled
from ds_mofa.capture.queue import Queue

__all__ = ["Together", "install"]


def install() -> None:
    """Have Inductor join the calls in what it compiles from now on. Where a pass of somebody else's stands already, it stays,
    and the calls stay as they are.
    """
    if config.post_grad_custom_post_pass is None:
        config.post_grad_custom_post_pass = Together()


class Together(CustomGraphPass):
    """Joins calls of ``add_linear``, each with those that follow it, while a :class:`ds_mofa.capture.queue.Queue` would let
    them wait. What they take lives until the last of them.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for calls in list(_groups(graph)):
            if len(calls) > 1:
                _join(graph, calls)

    def uuid(self) -> bytes:
        """Of compiled code's cache."""
        return get_hash_for_files((__file__,), f"{Queue.COUNT} {Queue.BYTES}")


_OPERANDS = ("x", "dy")


def _groups(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The calls to be joined, in their order."""
    calls: list[fx.Node] = []
    total = 0
    for node in graph.nodes:
        if not _can_be_joined(node):
            continue
        if len(calls) == Queue.COUNT or total >= Queue.BYTES:
            yield calls
            calls, total = [], 0
        calls.append(node)
        total += sum(_bytes(_operand(node, name).meta["val"]) for name in _OPERANDS)
    yield calls


def _can_be_joined(node: fx.Node) -> bool:
    """Whether it is a call for a linear that is used once. Of one that is used again every launch has to see the sums of the
    last; and torch 2.11 would copy the key that they share, by code for the host in the midst of the GPU's.
    """
    if node.target is not auto_functionalized_v2 or node.args[0] is not compiled.add_linear:
        return False
    after = [user for changed in node.users for user in changed.users]
    return _key(node).op == "placeholder" and all(user.target is torch.ops.aten.copy_.default for user in after)


def _join(graph: fx.Graph, calls: Sequence[fx.Node]) -> None:
    keys = [_key(call) for call in calls]
    of_keys: dict[str, Any] = {f"_keys_{i}_base_index": i for i in range(len(keys))}
    operands: dict[str, Any] = {name: [_operand(call, name) for call in calls] for name in _OPERANDS}
    with graph.inserting_after(calls[-1]):
        joined = graph.call_function(
            auto_functionalized_v2,
            (compiled.add_linears,),
            {**operands, "_keys_length": len(keys), **of_keys, "_all_bases": keys},
        )
    joined.meta["val"] = (None, *(key.meta["val"] for key in keys))
    after = joined
    for i, call in enumerate(calls):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (joined, 1 + i))
        after.meta["val"] = keys[i].meta["val"]
        for changed in list(call.users):  # the key that the call has made of its own
            changed.replace_all_uses_with(after)
            graph.erase_node(changed)
        graph.erase_node(call)


def _key(call: fx.Node) -> fx.Node:
    bases: Any = call.kwargs["_all_bases"]
    return bases[0]


def _operand(call: fx.Node, name: str) -> fx.Node:
    operand: Any = call.kwargs[name]
    return operand


def _bytes(tensor: Tensor) -> int:
    """Of a tensor whose sizes may be symbols: as it was when it was traced."""
    count: Any = tensor.numel()
    return (count if isinstance(count, int) else count.node.hint or 0) * tensor.element_size()
