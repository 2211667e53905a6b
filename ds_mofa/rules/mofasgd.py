"""MoFaSGD's rule: :mod:`ds_mofa.factors` on the owner's factors, and U diag(coefficients) V^T for everyone."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_mofa.diagnostics import MEASURES, measure
from ds_mofa.factors import (
    Batch,
    Factors,
    Grams,
    gram_matrices,
    live_directions,
    projected_norm,
    resized,
    start_factors,
    update_many,
)
from ds_mofa.kernels import triton_serves
from ds_mofa.options import Options
from ds_mofa.owner import Owner, Piece
from ds_mofa.partition import Exchange, Layout, Shapes
from ds_mofa.rules.rule import Rule, State

__all__ = ["MoFaSGDRule"]

_MOST_BALANCED = 10.0  # a matrix without new gradients, an expert that no token goes to, has ever less momentum


class MoFaSGDRule(Rule):
    """The state is the momentum's U, V and sigma, in the layout of the sketches, over which the new ones are written.

    A published coefficient that is NaN says that its owner has no factors: the others learn of it by the all-gather
    that is made anyway.
    """

    name = "MoFaSGD"
    fields = ("U", "V", "sigma")

    def __init__(self, options: Options):
        super().__init__(options.rank, options.seed)
        self._options = options
        self._grams: list[Grams] | None = None

    @staticmethod
    def tensors(m: int, n: int, r: int) -> Shapes:
        return (m, r), (n, r), (r,)

    def projected_square(self, owner: Owner, reduced: Tensor, steps: int) -> Tensor:
        pieces = itertools.chain.from_iterable(owner.passes(reduced))
        self._grams = [gram_matrices(*_batch(piece)) for piece in pieces]  # one after the other
        nothing = reduced.new_zeros((), dtype=torch.float64)  # an owner of no matrix adds up in the others' dtype
        return sum((projected_norm(*grams).sum() for grams in self._grams), nothing)

    def update(self, owner: Owner, reduced: Tensor, working: Tensor, clip: float | Tensor, steps: int) -> None:
        beta, gamma = self._options.beta, self._options.gamma * clip  # a clipped gradient is a lighter one
        if steps == 0:
            for piece in owner.pieces(reduced):
                psi, _, _ = piece.part.views(working)
                _write([piece], [start_factors(piece.Y, piece.Z, psi.to(piece.Y.dtype), gamma=gamma)])
            return
        grams = iter(self._grams)
        for pieces in owner.passes(reduced):
            own = list(itertools.islice(grams, len(pieces)))
            _write(pieces, update_many([_batch(p) for p in pieces], beta=beta, gamma=gamma, grams=own))  # and let go

    def publish(self, owner: Owner, updated: Tensor | None, working: Tensor, exchange: Exchange) -> None:
        level = self._level(owner, updated, working.device, exchange) if self._options.balance else None
        for block in owner.blocks:
            left, right, coefficients = block.views(working)
            if updated is None:
                coefficients.fill_(math.nan)
                continue
            U, V, sigma = owner.sketches(block, updated)
            left.copy_(U)
            right.copy_(V)
            coefficients.copy_(self._coefficients(sigma.to(working.device), level))

    def failed(self, layout: Layout, working: Tensor, steps: int) -> bool:
        if steps > 0 and triton_serves(working):
            return False  # its SVD raises nothing, and the host need not wait for the gathered coefficients
        coefficients = [block.views(working)[2] for block in layout.blocks]
        return not bool(torch.stack([torch.isfinite(part).all() for part in coefficients]).all())

    def take_back(self, owner: Owner, working: Tensor, exchange: Exchange) -> None:
        self.publish(owner, owner.state, working, exchange)

    def keep(self, owner: Owner, updated: Tensor) -> None:
        owner.keep(updated)

    def forget(self) -> None:
        self._grams = None

    def measures(self, owner: Owner, updated: Tensor, clip: float | Tensor, count: int) -> Tensor | None:
        if self._grams is None:
            return None
        beta, gamma = self._options.beta, self._options.gamma * clip
        values = torch.zeros(count, len(MEASURES), dtype=torch.float64, device=updated.device)
        for (part, old), (_, new), (left, right) in zip(owner.kept(), owner.kept(updated), self._grams, strict=True):
            members = torch.tensor(part.members, device=updated.device)
            values[members] = measure(old[2].to(updated.device), left, right, new[2], beta=beta, gamma=gamma)
        return values

    def lr_factor(self, m: int, n: int) -> float:
        return self._options.shape_factor(m, n)

    def restore(self, state_layout: Layout, state: Tensor, layout: Layout, working: Tensor, steps: int) -> None:
        working.copy_(state)

    def resized(self, saved: Sequence[State], ranks: set[int]) -> tuple[list[State], str]:
        """See :func:`ds_mofa.factors.resized`."""
        new, kept = [], torch.zeros(2, dtype=torch.float64)  # squares of sigma: after and before
        for U, V, sigma in saved:
            one = resized(Factors(U, sigma, V), self.rank)
            kept += torch.stack([one.sigma.double().square().sum(), sigma.double().square().sum()])
            new.append((one.U, one.V, one.sigma))
        if max(ranks) < self.rank:
            effect = "grown by directions without momentum, which the next gradients fill"
        else:
            effect = f"truncated to the leading ones, which hold {float(kept[0] / kept[1].clamp_min(1e-300)):.4%} of "
            effect += "the momentum's squared norm"
        were = ", ".join(map(str, sorted(ranks)))
        return new, f"the checkpoint's factors have rank {were}, this run's {self.rank}: {effect}"

    def _level(self, owner: Owner, updated: Tensor | None, device: torch.device, exchange: Exchange) -> Tensor:
        """The mean of log |sigma| over all matrices with momentum. Collective."""
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        if updated is not None and owner.blocks:
            sigmas = [owner.sketches(block, updated)[2] for block in owner.blocks]
            norms = torch.cat([sigma.norm(dim=-1) for sigma in sigmas]).to(device, torch.float64)
            moving = norms > 0
            sums = torch.stack([torch.where(moving, norms, 1.0).log().sum(), moving.sum().double()])
        total, count = exchange.sum(sums)
        return total / count.clamp_min(1)

    def _coefficients(self, sigma: Tensor, level: Tensor | None) -> Tensor:
        """What the columns of U are multiplied by in the update, (B, r); ``level`` where matrices are balanced."""
        coefficients = live_directions(sigma)
        if self._options.update_rule == "inverse_sigma":
            coefficients = coefficients * sigma.reciprocal().clamp_max(self._options.inverse_sigma_clamp)
        if level is not None:
            norm = sigma.norm(dim=-1, keepdim=True)
            factor = (self._options.balance * (level - norm.double().log())).exp()  # without momentum nothing moves
            coefficients = coefficients * factor.clamp(1 / _MOST_BALANCED, _MOST_BALANCED).to(sigma.dtype)
        return coefficients


def _batch(piece: Piece) -> Batch:
    U, V, sigma = piece.state
    return Factors(U, sigma, V), piece.Y, piece.Z


def _write(pieces: Sequence[Piece], updated: Sequence[Factors]) -> None:
    """The new factors over the sketches that they come from."""
    for piece, new in zip(pieces, updated, strict=True):
        for view, value in zip((piece.Y, piece.Z, piece.core), (new.U, new.V, new.sigma), strict=True):
            view.copy_(value)
