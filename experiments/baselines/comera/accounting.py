"""What training by CoMERA keeps, beside what training of the dense model by AdamW would."""

import dataclasses
import math

from torch import nn

from experiments.baselines.accounting import state_bytes
from experiments.baselines.comera.layers import TensorTrainEmbedding, TensorTrainLinear
from experiments.baselines.comera.optimizer import CoMERA

__all__ = ["Footprint", "footprint"]


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes between two steps; activations are not among them.

    Attributes:
        parameters: of all.
        gradients: of those that are trained, at their most, before the step.
        states: of AdamW as they are; 0 before the first step.
        numbers, dense_numbers: how many parameters there are, and how many there would be in the dense model.
    """

    parameters: int
    gradients: int
    states: int
    numbers: int
    dense_numbers: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.states

    @property
    def compression(self) -> float:
        """Of the whole model, by numbers."""
        return self.dense_numbers / self.numbers


def footprint(model: nn.Module, optimizer: CoMERA) -> Footprint:
    """Count a model's parameters, which pruning makes fewer, and what belongs to them."""
    params = list(model.parameters())
    numbers = sum(param.numel() for param in params)
    in_trains = sum(p.numel() for train in optimizer.trains.values() for p in (*train.cores, train.diagonal))
    dense = sum(_dense_numbers(train) for train in optimizer.trains.values())
    return Footprint(
        parameters=sum(param.numel() * param.element_size() for param in params),
        gradients=sum(param.numel() * param.element_size() for param in params if param.requires_grad),
        states=state_bytes(optimizer),
        numbers=numbers,
        dense_numbers=numbers - in_trains + dense,
    )


def _dense_numbers(train: TensorTrainLinear | TensorTrainEmbedding) -> int:
    if isinstance(train, TensorTrainEmbedding):
        return train.num_embeddings * train.embedding_dim
    return math.prod(train.dims)
