"""fp32 masters of 16-bit matrices (``master_weights``): what an update is written into before it is rounded."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ds_mofa.kernels.shard import Shard
from ds_mofa.parameters import Matrix
from ds_mofa.partition.exchange import Exchange

__all__ = ["Masters"]


class Masters:
    """This rank's masters: whole ones where it has whole weights, shards of them in stage 3.

    They are made in the first step, since a backend may partition the weights after the optimizer is built.

    Args:
        wanted: whether there are to be any, of 16-bit weights; without, every method does nothing.
        matrices: what they are of.
        exchange: the collectives.
        device: where those are.
        shard_of: this rank's part of a matrix; asked anew each time.
        zeros: makes fp32 memory for a number of elements, for weights on the given device.

    Attributes:
        tensors: flat, in the order of ``matrices``; None before the first step.
    """

    def __init__(
        self,
        wanted: bool,
        matrices: Sequence[Matrix],
        exchange: Exchange,
        device: torch.device,
        shard_of: Callable[[Matrix], Shard],
        zeros: Callable[[int, torch.dtype, torch.device], Tensor],
    ):
        self._wanted = wanted
        self._matrices, self._exchange, self._device = matrices, exchange, device
        self._shard_of, self._zeros = shard_of, zeros
        self.tensors: list[Tensor] | None = None
        self._versions: list[int] = []  # of the weights when this object's owner had written them

    def of(self, indices: Sequence[int]) -> list[Tensor] | None:
        """Those of these matrices, made where there are none yet."""
        if not self._wanted:
            return None
        tensors = self.tensors
        if tensors is None:
            self._wanted = any(matrix.param.dtype in (torch.bfloat16, torch.float16) for matrix in self._matrices)
            if not self._wanted:
                return None
            tensors = self._read()
        return [tensors[index] for index in indices]

    def written(self) -> None:
        """The weights are as the masters say: call it after a step."""
        if self.tensors is not None:
            self._versions = [matrix.param._version for matrix in self._matrices]

    def look(self) -> None:
        """Read anew where something else has written the weights since :meth:`written`: before a step."""
        if self.tensors is not None and self._versions:
            for matrix, master, version in zip(self._matrices, self.tensors, self._versions):
                if matrix.param._version != version:
                    master.copy_(self._shard_of(matrix).flat)

    def refresh(self) -> None:
        """Read them anew from the weights, after something else has written those."""
        if self.tensors is not None:
            self._read()

    def state_dict(self) -> dict[str, Tensor]:
        """By the names of their matrices, on the CPU: this rank's shards in stage 3; all of them on rank 0, and nothing
        elsewhere, where every rank has the same. Empty before the first step.
        """
        return {
            matrix.name: master.to("cpu", copy=True)
            for matrix, master in zip(self._matrices, self.tensors or ())
            if self._exchange.rank == 0 or not self._is_whole(matrix)
        }

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Take over those of the same rank of a world of the same size; what is missing is read from the weights.

        Collective. The weights must have been loaded before.
        """
        if not self._wanted:
            return
        for matrix, master in zip(self._matrices, self._read()):
            if matrix.name in saved:
                master.copy_(saved[matrix.name])
            if self._is_whole(matrix):
                whole = master.to(self._device)
                self._exchange.broadcast(whole, 0)
                master.copy_(whole)
        self._versions = []

    def load_parts(self, parts: Sequence[Tensor | None]) -> None:
        """Take over this process's elements of each, flat, which may be the masters' own memory; what is None is read from
        the weights, which must have been loaded before.
        """
        masters = self.of(range(len(self._matrices)))
        if masters is None:
            return
        for matrix, master, part in zip(self._matrices, masters, parts, strict=True):
            master.copy_(self._shard_of(matrix).flat if part is None else part)
        self._versions = []

    def _read(self) -> list[Tensor]:
        """Make them where there are none yet, and copy the weights into them."""
        weights = [self._shard_of(matrix).flat for matrix in self._matrices]
        if self.tensors is None:
            self.tensors = [self._zeros(flat.numel(), torch.float32, flat.device) for flat in weights]
        for master, flat in zip(self.tensors, weights):
            master.copy_(flat)
        return self.tensors

    def _is_whole(self, matrix: Matrix) -> bool:
        return self._shard_of(matrix).flat.numel() == matrix.numel
