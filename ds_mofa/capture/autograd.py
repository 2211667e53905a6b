"""What capture asks of autograd: whether the running backward wants a weight's gradient at all.

Capture follows autograd: what is added to a sketch is what autograd would have added to ``.grad``.
"""

from typing import Any

import torch
from torch import nn

__all__ = ["OURS", "leaf_node", "plain_linear", "wanted"]

# zero.Init replaces F.linear for the whole process by one that computes weight gradients.
plain_linear = torch._C._nn.linear
OURS = "ds_mofa_forward"  # marks a forward that this package has put in


def leaf_node(param: nn.Parameter) -> torch.autograd.graph.Node | None:
    """The AccumulateGrad node of a leaf, from within an operator, below autograd; None of one that is frozen. torch's own
    ``get_gradient_edge`` takes four times as long.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        function = param.view_as(param).grad_fn
    return None if function is None else function.next_functions[0][0]


def wanted(node: Any) -> bool | None:
    """Whether the running backward accumulates into the leaf of this AccumulateGrad node; None where it is an
    ``autograd.grad`` that returns that leaf's gradient. A leaf that was frozen after the forward is not.
    """
    if node is None or not node.variable.requires_grad:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        if "autograd.grad" not in str(error):
            raise
        return None
