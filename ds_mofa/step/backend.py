"""What the step asks of the engine around it: where the weights lie, and how processes reach each other.

A backend is one object of this kind. :class:`OneProcess` is the plainest; each other is an adapter in
:mod:`ds_mofa.backends`. Those that a plain PyTorch loop meets are found by :data:`ENGINES` when an optimizer is first used;
DeepSpeed builds its own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_mofa.capture.sink import Arrived, Gathered
from ds_mofa.kernels.int8 import Int8Weight
from ds_mofa.kernels.shard import Shard
from ds_mofa.options import OptionError
from ds_mofa.parameters import Matrix
from ds_mofa.partition.exchange import Exchange
from ds_mofa.weights.staging import HostMemory

__all__ = [
    "ENGINES",
    "Backend",
    "Engine",
    "OneProcess",
    "in_several_processes",
    "replaced",
    "rows_from",
    "whole_matrix",
]


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
        """This process's part of a matrix or stack, a range of its row-major elements. It is asked anew in every step, since an
        engine may move the weights.
        """

    def norms(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """2-norm of each of AdamW's gradients over all processes, 0-dim plain tensors. This one: of whole gradients."""
        return [torch.linalg.vector_norm(grad) for grad in grads]

    def compute_dtype(self, matrices: Sequence[Matrix]) -> torch.dtype:
        """The dtype of forward and backward, in which the working copies are kept. This one: the matrices' own, or fp32
        where they differ.
        """
        dtypes = {matrix.param.dtype for matrix in matrices}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    # What a backend of whole weights need not say.

    def arrival(self, matrix: Matrix) -> Callable[[Tensor], Arrived] | None:
        """From a gradient that autograd, or the engine after it, has put into ``.grad``, to what this process is to
        sketch of it. None: all of it, as a part of the sum over all processes.
        """
        return None

    def mark(self, matrix: Matrix, local: Tensor) -> Tensor:
        """What stands in ``.grad``, around a tensor without memory of the shape of this process's part."""
        return local

    def parts(self, matrix: Matrix) -> int:
        """Into how many processes' parts the weight is cut, whose squared norms add up to that of ``.grad``."""
        return 1

    def check(self, rest: Sequence[Tensor]) -> None:
        """Before a step. Collective where it must be.

        Args:
            rest: what AdamW trains.

        Raises:
            RuntimeError: the model's weights are not those that an update would reach, or nobody reduces AdamW's gradients.
        """
        return

    def rows(self, matrix: Matrix, whole: Tensor) -> Tensor:
        """For a checkpoint: a tensor (k, ...) that every process has, cut along its first dimension as the weight is."""
        return whole

    def like_weight(self, matrix: Matrix, flat: Tensor) -> Tensor:
        """For a checkpoint: this process's elements of the weight, in another dtype, placed as the weight is."""
        return flat.view(matrix.full_shape)


@dataclasses.dataclass
class OneProcess(Backend):
    """All weights whole, in this process alone, or of a group of one."""

    device: torch.device
    group: dist.ProcessGroup | None = None
    exchange: Exchange = dataclasses.field(default_factory=Exchange)
    host: HostMemory | None = None
    gathered: Gathered | None = None

    def shard_of(self, matrix: Matrix) -> Shard:
        return whole_matrix(matrix)

    def check(self, rest: Sequence[Tensor]) -> None:
        """Several processes that came after the build would each train a model of their own."""
        if in_several_processes(self.group):
            raise OptionError(
                "the optimizer was built in one process, and there are several processes now, where nothing would add up its "
                "sketches: build it after torch.distributed.init_process_group, or in an engine of DeepSpeed's"
            )


class Engine(Protocol):
    """One kind of run outside of DeepSpeed."""

    def refuse(self, model: nn.Module) -> None:
        """An optimizer is about to be built over a model, whose weights may not be what they were.

        Raises:
            OptionError: it is too late to build one.
        """

    def announce(self, model: nn.Module, matrices: Sequence[Matrix]) -> Callable[[], None] | None:
        """An optimizer is built over these matrices; the model may not be sharded, wrapped or moved yet.

        Returns:
            What undoes whatever this has done to the model.
        """
        return None

    def connect(
        self, model: nn.Module | None, matrices: Sequence[Matrix], group: dist.ProcessGroup | None
    ) -> Backend | None:
        """The backend of the matrices as they are now; None where this engine does not run them. Collective.

        Args:
            model: None where it is gone.
            matrices: with the parameters that are trained by now.
            group: all processes that see different data, where the user has said so.

        Raises:
            OptionError: it cannot be right; the message has the way out.
        """


# The first whose ``connect`` gives a backend has it; where none does, the matrices are of one process.
ENGINES: list[Engine] = []


def in_several_processes(group: dist.ProcessGroup | None = None) -> bool:
    """Whether other processes train too."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def whole_matrix(matrix: Matrix) -> Shard:
    """The shard of a process that holds all of W."""
    return rows_from(0, matrix.param.data)


def rows_from(start: int, weight: Tensor) -> Shard:
    """A shard of a weight, or of rows of one. ``start``: index of its first element."""
    if isinstance(weight, Int8Weight):
        return Shard(weight.codes.view(-1), start, exponents=weight.exponents.view(-1))
    return Shard(weight.view(-1), start)


def replaced(matrix: Matrix) -> str:
    """What to say where a module holds another parameter in the matrix's place."""
    return (
        f"another parameter stands in the place of {matrix.name!r} since the optimizer was built: "
        "load_state_dict(assign=True), a second fully_shard or an assignment has put it there. Build the optimizer after that"
    )
