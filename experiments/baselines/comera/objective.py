"""What CoMERA minimises: the loss, and how large the trains are."""

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.baselines.comera.layers import TensorTrain

__all__ = ["TrainSizes"]


class TrainSizes:
    """The sizes of some trains, computed for all at once: a model has hundreds of bonds, and each would be a few kernels.

    Bond 0 stands for all ends of trains, where the rank is 1.

    Args:
        trains: in whatever order; after a pruning this is made anew.
    """

    def __init__(self, trains: list[TensorTrain]):
        self._trains, self._threshold = trains, trains[0].threshold
        dims, left, right, of_entry, bond = [], [], [], [], 0
        for train in trains:
            bonds = [0, *range(bond + 1, bond + 1 + len(train.ranks)), 0]
            bond += len(train.ranks)
            dims += train.dims
            left += bonds[:-1]
            right += bonds[1:]
            of_entry += [number for number, rank in zip(bonds[1:], train.ranks) for _ in range(rank)]
        device, self._bonds = trains[0].diagonal.device, bond + 1
        self._dims = torch.tensor(dims, device=device, dtype=torch.float32)
        self._left, self._right = torch.tensor(left, device=device), torch.tensor(right, device=device)
        self._of_entry = torch.tensor(of_entry, device=device)

    def stored(self) -> int:
        """Numbers in all cores."""
        return sum(core.numel() for train in self._trains for core in train.cores)

    @torch.no_grad()
    def live(self) -> Tensor:
        """Numbers in all cores once what is zero is taken out: a scalar on the device."""
        ranks = self._per_bond((self._diagonals() > self._threshold).float()).clamp_min(1.0)
        return self._count(ranks)

    def mean(self) -> Tensor:
        """The mean of the diagonals' live entries: |D|_1 / |D|_0."""
        diagonals = self._diagonals()
        live = (diagonals.detach() > self._threshold).sum().clamp_min(1)
        return F.threshold(diagonals, self._threshold, 0.0).sum() / live

    def relaxed(self) -> Tensor:
        """sum_k |D_{k-1}|_1 n_k |D_k|_1: the number of :meth:`live`, with l1 in the place of l0."""
        return self._count(self._per_bond(F.threshold(self._diagonals(), self._threshold, 0.0)))

    def _diagonals(self) -> Tensor:
        diagonals = torch.cat([train.diagonal for train in self._trains])
        return diagonals.to(torch.promote_types(diagonals.dtype, torch.float32))

    def _per_bond(self, entries: Tensor) -> Tensor:
        """(bonds,), the sums over each bond's entries, and 1 for bond 0."""
        sums = entries.new_zeros(self._bonds).index_add(0, self._of_entry, entries)
        return torch.cat([sums.new_ones(1), sums[1:]])

    def _count(self, ranks: Tensor) -> Tensor:
        return (ranks[self._left] * self._dims * ranks[self._right]).sum()
