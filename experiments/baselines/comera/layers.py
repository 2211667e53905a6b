"""Linears and embeddings whose weight is a tensor train with a diagonal at each bond.

W, as a tensor of K dimensions, is G_1 D_1 G_2 D_2 ... D_{K-1} G_K with cores G_k (r_{k-1}, n_k, r_k) and the diagonal D_k
(r_k). Entries of a D_k at or below the threshold count as zero, get no gradient, and are taken out by :meth:`prune`.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.baselines.comera.contraction import best_path, contract
from experiments.baselines.comera.trains import full

__all__ = ["TensorTrain", "TensorTrainEmbedding", "TensorTrainLinear"]

# A parameter, the smaller one in its place, and what turns a tensor of the first shape into one of the second.
Change = tuple[nn.Parameter, nn.Parameter, Callable[[Tensor], Tensor]]


class TensorTrain(nn.Module):
    """Cores and the diagonals between them.

    Args:
        cores: G_k, (r_{k-1}, n_k, r_k) each.
        threshold: at or below which an entry of a diagonal is zero.

    Attributes:
        diagonal: D_1, ..., D_{K-1} one after the other, (r_1 + ... + r_{K-1},), ones at the start.
    """

    def __init__(self, cores: Sequence[Tensor], threshold: float):
        super().__init__()
        self.threshold = threshold
        self.cores = nn.ParameterList(nn.Parameter(core) for core in cores)
        self.diagonal = nn.Parameter(cores[0].new_ones(sum(self.ranks)))

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(core.shape[1] for core in self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_1, ..., r_{K-1}."""
        return tuple(core.shape[2] for core in self.cores)[:-1]

    def weighted(self) -> list[Tensor]:
        """G_1 D_1, ..., G_{K-1} D_{K-1}, G_K."""
        live = F.threshold(self.diagonal, self.threshold, 0.0).split(self.ranks)
        return [core * D for core, D in zip(self.cores, live)] + [self.cores[-1]]

    @torch.no_grad()
    def prune(self) -> list[Change]:
        """Take out what the threshold has made zero: the layer computes what it did. A bond keeps one entry at least.

        The parameters that shrink are new ones: a graph that is still alive knows the old by their shapes.
        """
        live = [_kept(D, self.threshold) for D in self.diagonal.split(self.ranks)]
        if all(len(kept) == rank for kept, rank in zip(live, self.ranks)):
            return []
        first = itertools.accumulate(self.ranks, initial=0)
        entries = torch.cat([kept + start for kept, start in zip(live, first)])
        changes = [self._change(self.diagonal, lambda D: D[entries])]
        every = [torch.zeros(1, dtype=torch.long, device=entries.device)]
        for k, (rows, columns) in enumerate(itertools.pairwise([*every, *live, *every])):
            select = _selector(rows, columns)
            changes.append(self._change(self.cores[k], select))
            self.cores[k] = changes[-1][1]
        self.diagonal = changes[0][1]
        return changes

    @staticmethod
    def _change(old: nn.Parameter, select: Callable[[Tensor], Tensor]) -> Change:
        return old, nn.Parameter(select(old).clone(), requires_grad=old.requires_grad), select

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Takes cores of other ranks, as pruning leaves them. No graph through this layer may be alive."""
        for name, param in [("diagonal", self.diagonal), *((f"cores.{k}", core) for k, core in enumerate(self.cores))]:
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.dim() == param.dim() and saved.shape[1:-1] == param.shape[1:-1]:
                param.data = param.data.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _kept(D: Tensor, threshold: float) -> Tensor:
    """The places of the live entries, or of the largest where none is."""
    live = (D > threshold).nonzero().flatten()
    return live if len(live) else D.argmax().reshape(1)


def _selector(rows: Tensor, columns: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda core: core[rows][:, :, columns]


class TensorTrainLinear(TensorTrain):
    """y = x W^T + b, W (m, n), the train's dimensions being those of n, then those of m.

    Args:
        cores: as many for n as for m.
        threshold: see :class:`TensorTrain`.
        bias: (m,), or None; taken as it is.
    """

    def __init__(self, cores: Sequence[Tensor], threshold: float, bias: nn.Parameter | None):
        super().__init__(cores, threshold)
        self.bias = bias
        half = len(cores) // 2
        self.in_features, self.out_features = math.prod(self.dims[:half]), math.prod(self.dims[half:])

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m), in the cheapest order for this many tokens."""
        count = len(self.cores)
        half, tokens = count // 2, x.numel() // self.in_features
        # Index 0 is the token, 1 to K the dimensions, the rest the bonds.
        bonds = range(count + 1, 2 * count + 2)
        terms = ((0, *range(1, half + 1)), *((bonds[k], k + 1, bonds[k + 1]) for k in range(count)))
        # Of tokens the search sees the next power of two: batches of other lengths share a path.
        sizes = (1 << max(tokens - 1, 0).bit_length(), *self.dims, 1, *self.ranks, 1)
        path = best_path(terms, (0, *range(half + 1, count + 1)), sizes)
        y = contract(path, [x.reshape(tokens, *self.dims[:half]), *self.weighted()])
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        """W (m, n)."""
        return full(self.weighted()).reshape(self.in_features, self.out_features).mT

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, dims={self.dims}, ranks={self.ranks}"


class TensorTrainEmbedding(TensorTrain):
    """y = E[ids], E (V, e) a tensor-train matrix: core k has the dimension v_k e_k, a row's digit and a column's.

    The rows beyond V that make v_1 ... v_K divisible are never looked up. ``padding_idx`` has no meaning here: no row has
    numbers of its own that could stay as they are.

    Args:
        cores: see above.
        threshold: see :class:`TensorTrain`.
        rows: v_1, ..., v_K.
        num_embeddings: V.
    """

    def __init__(self, cores: Sequence[Tensor], threshold: float, rows: Sequence[int], num_embeddings: int):
        super().__init__(cores, threshold)
        self.rows, self.num_embeddings = tuple(rows), num_embeddings
        self.columns = tuple(dim // row for dim, row in zip(self.dims, rows))
        self.embedding_dim = math.prod(self.columns)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) to (..., e): each row that occurs once, from one table for either half of the cores.

        On a GPU this waits for the device, to know which rows occur.

        Raises:
            IndexError: an id is negative, or V or above.
        """
        occurring, places = ids.flatten().unique(return_inverse=True)
        if len(occurring) and not 0 <= int(occurring[0]) <= int(occurring[-1]) < self.num_embeddings:
            raise IndexError(f"ids must be >= 0 and < {self.num_embeddings}, and some of these are not")
        half = len(self.cores) // 2
        cores = self.weighted()
        # (v, e, r) and (v, r, e) of the two halves: what many rows share is computed once.
        leading = self._table(cores[:half], 0).squeeze(0)
        trailing = self._table(cores[half:], half).squeeze(-1).movedim(0, 1)
        below = math.prod(self.rows[half:])
        rows = torch.bmm(leading[occurring // below], trailing[occurring % below])
        return F.embedding(places, rows.flatten(1)).reshape(*ids.shape, self.embedding_dim)

    def dense(self) -> Tensor:
        """E (V, e)."""
        table = self._table(self.weighted(), 0).squeeze(0).squeeze(-1)
        return table[: self.num_embeddings]

    def _table(self, cores: Sequence[Tensor], first: int) -> Tensor:
        """(r, v, e, r'), the product of some neighbouring cores."""
        rows, columns = self.rows[first : first + len(cores)], self.columns[first : first + len(cores)]
        out = None
        for core, row, column in zip(cores, rows, columns):
            core = core.reshape(core.shape[0], row, column, core.shape[2])
            if out is None:
                out = core
                continue
            joined = torch.einsum("avep,pwfb->avwefb", out, core)
            out = joined.flatten(3, 4).flatten(1, 2)
        return out

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rows={self.rows}, ranks={self.ranks}"
