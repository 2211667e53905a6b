"""What the step asks of the engine around it: where the weights lie, and how processes reach each other.

A backend is one object of this kind. :class:`OneProcess` is the plainest; each other is an adapter in
:mod:`ds_mofa.backends`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ds_mofa.capture.sink import Gathered
from ds_mofa.kernels.shard import Shard
from ds_mofa.parameters import Matrix
from ds_mofa.partition.exchange import Exchange
from ds_mofa.weights.staging import HostMemory

__all__ = ["Backend", "OneProcess", "whole_matrix"]


class Backend(Protocol):
    """Where the weights of a model lie, and how its processes reach each other.

    Attributes:
        exchange: the collectives.
        device: of the sketches and working copies, and of the update.
        host: where to keep the fp32 state and masters; None: on ``device``.
        gathered: from a weight to the whole of it, where weights are released between forward and backward; None where
            they stay.
    """

    exchange: Exchange
    device: torch.device
    host: HostMemory | None
    gathered: Gathered | None

    def shard_of(self, matrix: Matrix) -> Shard:
        """This process's part of a matrix. It is asked anew in every step, since an engine may move the weights."""

    def norms(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """2-norm of each of AdamW's gradients over all processes, 0-dim plain tensors. This one: of whole gradients."""
        return [torch.linalg.vector_norm(grad) for grad in grads]


@dataclasses.dataclass
class OneProcess(Backend):
    """All weights whole, in this process alone."""

    device: torch.device
    exchange: Exchange = dataclasses.field(default_factory=Exchange)
    host: HostMemory | None = None
    gathered: Gathered | None = None

    def shard_of(self, matrix: Matrix) -> Shard:
        return whole_matrix(matrix)


def whole_matrix(matrix: Matrix) -> Shard:
    """The shard of a process that holds all of W."""
    return Shard(matrix.weight.view(-1))
