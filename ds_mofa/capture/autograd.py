"""What capture asks of autograd: whether the running backward wants a weight's gradient at all.

Capture follows autograd: what is added to a sketch is what autograd would have added to ``.grad``.
"""

import torch
from torch import nn

__all__ = ["OURS", "leaf_node", "plain_linear", "wanted"]

# zero.Init replaces F.linear for the whole process by one that computes weight gradients.
plain_linear = torch._C._nn.linear
OURS = "ds_mofa_forward"  # marks a forward that this package has put in


def leaf_node(param: nn.Parameter) -> torch.autograd.graph.Node:
    """The AccumulateGrad node of a leaf, from within an operator, below autograd: autograd makes it and hands it out."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        return torch.autograd.graph.get_gradient_edge(param).node


def wanted(node: torch.autograd.graph.Node | None) -> bool | None:
    """Whether the running backward accumulates into the leaf of this AccumulateGrad node; None where it is an
    ``autograd.grad`` that returns that leaf's gradient.
    """
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        if "autograd.grad" not in str(error):
            raise
        return None
