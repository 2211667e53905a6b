"""How a module holds the weight that is captured in it: the parameter itself, or what a backend has put in its place."""

import types
import weakref
from collections.abc import Callable

from torch import Tensor, nn

from ds_mofa.capture.autograd import OURS
from ds_mofa.options import OptionError
from ds_mofa.parameters import Matrix, is_sharded

__all__ = ["holds", "leaf_in", "own_weight", "refuse_replaced", "replace_forward"]


def holds(module: nn.Module, matrix: Matrix, name: str = "weight") -> bool:
    """Whether the module's parameter of this name is the matrix, or what FSDP2 has gathered of it."""
    weight = module._parameters.get(name)
    if weight is None or weight is matrix.param:
        return weight is not None
    return is_sharded(matrix.param) and not is_sharded(weight) and tuple(weight.shape) == matrix.full_shape


def own_weight(param: Tensor | None, name: str = "weight") -> Callable[[nn.Module, Tensor], bool]:
    """Tells of a module in its forward, and the weight that it reads by that name, whether that is ``param``; where ``param``
    is sharded, whether it is what FSDP2 has gathered, which stands in its place.
    """
    if is_sharded(param):
        return lambda module, weight: weight is module._parameters.get(name) and not is_sharded(weight)
    return lambda module, weight: weight is param


def leaf_in(module: nn.Module, name: str = "weight") -> Callable[[Tensor], Tensor | None]:
    """A sink's ``leaf``: from a parameter to the tensor that a backward accumulates into, which is what the module holds by
    then, where the parameter is sharded.
    """
    reference = weakref.ref(module)

    def leaf(param: Tensor) -> Tensor | None:
        here = reference()
        return here._parameters.get(name) if here is not None and is_sharded(param) else param

    return leaf


def refuse_replaced(module: nn.Module, plain: Callable) -> None:
    """
    Args:
        plain: the forward of the module's class, which may stand in the module too.

    Raises:
        OptionError: something else has replaced the module's forward.
    """
    other = vars(module).get("forward")
    if other is not None and not hasattr(other, OURS) and getattr(other, "__func__", None) is not plain:
        other = getattr(other, "__qualname__", repr(other))
        raise OptionError(
            f'the forward of {module} has been replaced by {other}, which capture "linear" would undo: build '
            'the optimizer before that is done, or set capture to "hook"'
        )


def replace_forward(module: nn.Module, function: Callable) -> Callable[[], None]:
    """Let ``function``, which takes the module first, be its forward; what this returns undoes it."""
    setattr(function, OURS, True)
    vars(function)["__wrapped__"] = type(module).forward  # whose source TorchScript compiles
    forward = types.MethodType(function, module)  # its pickle is the class's
    module.forward = forward

    def undo() -> None:
        if vars(module).get("forward") is forward:  # a later optimizer's stays
            del module.forward

    return undo
