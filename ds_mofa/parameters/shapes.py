"""What a parameter is when it is whole, and whether it is cut up."""

from torch import Tensor

__all__ = ["full_shape", "is_sharded"]


def full_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter; ``zero.Init`` leaves (0,) in ``param.shape``."""
    return tuple(getattr(param, "ds_shape", param.shape))


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor. By its attribute: torch can be built without ``torch.distributed``."""
    return hasattr(tensor, "placements")
