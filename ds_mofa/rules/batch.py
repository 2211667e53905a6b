"""What an update rule sees of the model: batches of matrices of one shape, and nothing of ranks or buffers."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

__all__ = ["Field", "MatrixBatch", "PlaceSigns", "Published"]

# Writes a batch's random signs into F (B, m, k) and E (B, n, k).
PlaceSigns = Callable[[Tensor, Tensor], None]


class Field(NamedTuple):
    """One tensor of what the owner of a matrix keeps of it between steps, in fp32.

    Attributes:
        name: in a checkpoint.
        shape: of one matrix.
        slot: what of a :class:`MatrixBatch` holds the new value after :meth:`ds_mofa.rules.rule.Rule.update`: the step
            copies it into the state once every rank is known to have succeeded. None: ``update`` writes the state in
            place, and then it must not fail.
    """

    name: str
    shape: tuple[int, ...]
    slot: Literal["left", "right", "spectrum"] | None = None


class MatrixBatch(NamedTuple):
    """B matrices of one shape that one rank owns. R = r + k columns, k of random signs (:attr:`Rule.signs`).

    Attributes:
        shape: (m, n).
        state: one (B, *shape) tensor for each :class:`Field`; empty where it was not asked for.
        left: (B, m, R), what the sketch Z was taken with; compute dtype.
        right: (B, n, R), what Y was taken with; compute dtype.
        Y: (B, m, R), the mean gradient's sketch G right. ``update`` overwrites it with the new left.
        Z: (B, n, R), G^T left. ``update`` overwrites it with the new right.
        spectrum: (B, R), to be filled by ``update``: what :meth:`Rule.coefficients` turns into coefficients.
        came: (B,) bool, which matrices had a gradient in this step.
        memo: of the rule, on the host: it lives from step to step, and is empty after a start or a load.
    """

    shape: tuple[int, int]
    state: tuple[Tensor, ...]
    left: Tensor
    right: Tensor
    Y: Tensor
    Z: Tensor
    spectrum: Tensor
    came: Tensor
    memo: dict[str, Any]


class Published(NamedTuple):
    """What every rank has of a step for B matrices of one shape, in the compute dtype, when their weights are written.

    Attributes:
        shape: (m, n).
        left: (B, m, R), as ``update`` has made it.
        right: (B, n, R), likewise.
        coefficients: (B, R); all zero for a matrix that stays.
        previous: what :meth:`Rule.previous` returned before the update.
        signs: writes the signs that the step's sketches were taken with, where :attr:`Rule.signs` is not 0.
    """

    shape: tuple[int, int]
    left: Tensor
    right: Tensor
    coefficients: Tensor
    previous: Tensor | None
    signs: PlaceSigns | None
