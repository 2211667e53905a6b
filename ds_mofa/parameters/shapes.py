"""The shape that a parameter has when it is whole."""

from torch import Tensor

__all__ = ["full_shape"]


def full_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter; ``zero.Init`` leaves (0,) in ``param.shape``."""
    return tuple(getattr(param, "ds_shape", param.shape))
