"""What a parameter is when it is whole, and whether it is cut up."""

from typing import Any

from torch import Tensor

__all__ = ["full_shape", "is_sharded", "local_part"]


def full_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter; ``zero.Init`` leaves (0,) in ``param.shape``."""
    return tuple(getattr(param, "ds_shape", param.shape))


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor. By its attribute: torch can be built without ``torch.distributed``."""
    return hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor itself."""
    sharded: Any = tensor
    return sharded.to_local().detach() if is_sharded(tensor) else tensor
