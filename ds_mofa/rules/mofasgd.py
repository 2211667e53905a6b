"""MoFaSGD's rule: :mod:`ds_mofa.factors` on the owner's factors, and U diag(coefficients) V^T for everyone; with
``explore`` also what :mod:`ds_mofa.exploring` finds beside them.
"""

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
    gradient_came,
    gram_matrices,
    live_directions,
    projected_norm,
    resized,
    start_factors,
    update_many,
    waiting_factors,
)
from ds_mofa.kernels import triton_serves
from ds_mofa.options import OptionError, Options
from ds_mofa.owner import Owner, Piece
from ds_mofa.partition import Block, Exchange, Layout, Shapes
from ds_mofa.rules.exploration import Exploration
from ds_mofa.rules.rule import Rule, State
from ds_mofa.subbatches import Part

__all__ = ["MoFaSGDRule"]

_MOST_BALANCED = 10.0  # a matrix whose gradients are nearly zero, an expert of few tokens, has hardly any momentum


class MoFaSGDRule(Rule):
    """The state is the momentum's U, V and sigma. New ones are written over the first r columns of the sketches, and
    the directions that are explored over the others. Without those, both have one layout.

    A matrix without a gradient keeps its state, and its published coefficients are zero: for it nothing is written.

    A published coefficient that is NaN says that its owner has no factors: the others learn of it by the all-gather
    that is made anyway.
    """

    name = "MoFaSGD"
    fields = ("U", "V", "sigma")

    def __init__(self, options: Options):
        super().__init__(options.rank, options.seed)
        self.diagnostics_every = options.diagnostics_every
        self._options = options
        self._grams: list[Grams] | None = None
        self._came: list[Tensor] | None = None  # of each piece, which matrices had a gradient; None: all of them
        self._exploration: Exploration | None = None  # from the first :meth:`prepare` on

    @property
    def columns(self) -> int:
        return self.rank + self._options.explore

    @staticmethod
    def tensors(m: int, n: int, r: int) -> Shapes:
        return (m, r), (n, r), (r,)

    def held(self) -> list[Tensor]:
        return [] if self._exploration is None else self._exploration.held()

    def square_norm(self, owner: Owner, reduced: Tensor, steps: int) -> Tensor:
        if not self._options.explore:
            return super().square_norm(owner, reduced, steps)
        if steps == 0:
            seen = [part.square().sum() for piece in owner.pieces(reduced) for part in self._of_momentum(piece)]
            square = sum(seen, reduced.new_zeros(())) / 2
        else:
            square = self.projected_square(owner, reduced, steps)
        return square + 0 * reduced.sum()  # NaN where one of the other columns is no number

    def projected_square(self, owner: Owner, reduced: Tensor, steps: int) -> Tensor:
        pieces = itertools.chain.from_iterable(owner.passes(reduced))
        self._grams = [gram_matrices(*self._batch(piece)) for piece in pieces]  # one after the other
        nothing = reduced.new_zeros((), dtype=torch.float64)  # an owner of no matrix adds up in the others' dtype
        return sum((projected_norm(*grams).sum() for grams in self._grams), nothing)

    def projected_squares(self, owner: Owner, reduced: Tensor) -> list[Tensor]:
        return [projected_norm(*grams) for grams in self._grams]

    def update(self, owner: Owner, reduced: Tensor, working: Tensor, clip: float | Tensor, steps: int) -> None:
        beta, gamma = self._options.beta, self._options.gamma * clip  # a clipped gradient is a lighter one
        self._came = []
        if steps == 0:
            for piece in owner.pieces(reduced):
                Y, Z, _ = self._of_momentum(piece)
                psi, omega = (view[..., : self.rank].to(Y.dtype) for view in piece.part.views(working)[:2])
                self._came.append(gradient_came(piece.Y, piece.Z))
                new = start_factors(*(part.contiguous() for part in (Y, Z, psi)), gamma=gamma)
                self._write(piece, self._came[-1], new, waiting_factors(psi, omega))
                if self._exploration is not None:
                    self._exploration.stay(piece)
            return
        grams = iter(self._grams)
        for pieces in owner.passes(reduced):
            came = [gradient_came(piece.Y, piece.Z) for piece in pieces]
            if self._exploration is not None:
                self._exploration.explore(pieces, working, self._options.explore_length)
            batches, own = [self._batch(piece) for piece in pieces], list(itertools.islice(grams, len(pieces)))
            updated = update_many(batches, beta=beta, gamma=gamma, grams=own)
            for piece, moved, new, (old, _, _) in zip(pieces, came, updated, batches, strict=True):
                self._write(piece, moved, new, old)
            self._came += came

    def publish(self, owner: Owner, updated: Tensor | None, working: Tensor, exchange: Exchange) -> None:
        level = self._level(owner, updated, working.device, exchange) if self._options.balance else None
        if updated is None:
            for block in owner.blocks:
                block.views(working)[2].fill_(math.nan)
            return
        for piece, came in zip(owner.pieces(updated), self._came or itertools.repeat(None)):
            left, right, published = piece.part.views(working)
            left.copy_(piece.Y)
            right.copy_(piece.Z)
            coefficients = self._coefficients(piece.core, level)
            published.copy_(coefficients if came is None else torch.where(came.unsqueeze(-1), coefficients, 0))

    def failed(self, layout: Layout, working: Tensor, steps: int) -> bool:
        if steps > 0 and triton_serves(working):
            return False  # its SVD raises nothing, and the host need not wait for the gathered coefficients
        coefficients = [block.views(working)[2] for block in layout.blocks]
        return not bool(torch.stack([torch.isfinite(part).all() for part in coefficients]).all())

    def take_back(self, owner: Owner, working: Tensor, exchange: Exchange) -> None:
        kept = torch.zeros(owner.layout.segment, dtype=owner.state.dtype, device=working.device)
        for pieces in owner.passes(kept):
            for piece in pieces:
                for view, value in zip(self._of_momentum(piece), piece.state, strict=True):
                    view.copy_(value)
        self._came = None
        self.publish(owner, kept, working, exchange)

    def keep(self, owner: Owner, updated: Tensor) -> None:
        if not self._options.explore:
            owner.keep(updated)
            return
        for pieces in owner.passes(updated, back=True):
            for piece in pieces:
                for old, new in zip(piece.state, self._of_momentum(piece), strict=True):
                    old.copy_(new)

    def forget(self) -> None:
        self._grams = self._came = None

    def measures(self, owner: Owner, updated: Tensor, clip: float | Tensor, count: int) -> Tensor | None:
        if self._grams is None:
            return None
        beta, gamma = self._options.beta, self._options.gamma * clip
        values = torch.zeros(count, len(MEASURES), dtype=torch.float64, device=updated.device)
        for (part, old), piece, (left, right) in zip(owner.kept(), owner.pieces(updated), self._grams, strict=True):
            members, sigma = torch.tensor(part.members, device=updated.device), self._of_momentum(piece)[2]
            values[members] = measure(old[2].to(updated.device), left, right, sigma, beta=beta, gamma=gamma)
        return values

    def lr_factor(self, m: int, n: int) -> float:
        return self._options.shape_factor(m, n)

    def restore(self, state_layout: Layout, state: Tensor, layout: Layout, working: Tensor, steps: int) -> None:
        for old, new in zip(state_layout.blocks, layout.blocks, strict=True):
            for saved, view in zip(old.views(state), new.views(working), strict=True):
                view[..., : self.rank] = saved

    def parts(self, block: Block) -> list[Part]:
        return super().parts(block) if self._exploration is None else self._exploration.parts(block)

    def written(self, part: Part, working: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return part.views(working) if self._exploration is None else self._exploration.written(part, working)

    def prepare(self, layout: Layout, working: Tensor, steps: int) -> None:
        """See :class:`Rule`.

        Raises:
            OptionError: a coefficient may be larger than the working copies' dtype can hold.
        """
        if steps == 0:
            self._refuse_overflow(layout, working.dtype)
        super().prepare(layout, working, steps)
        if not self._options.explore:
            return
        if self._exploration is None:
            options = self._options
            self._exploration = Exploration(layout, self.rank, options.seed, options.update_bytes, working.device)
        self._exploration.draw(working, steps)

    def resized(self, saved: Sequence[State], ranks: set[int]) -> tuple[list[State], str]:
        """See :func:`ds_mofa.factors.resized`."""
        new, kept = [], torch.zeros(2, dtype=torch.float64, device="cpu")  # squares of sigma: after and before
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

    def _refuse_overflow(self, layout: Layout, dtype: torch.dtype) -> None:
        options = self._options
        most = torch.finfo(dtype).max / (_MOST_BALANCED if options.balance else 1)
        reason = f"{dtype} holds no number above {torch.finfo(dtype).max:g}"
        if options.balance:
            reason += f", and balance multiplies by up to {_MOST_BALANCED:g}"
        if options.update_rule == "inverse_sigma" and options.inverse_sigma_clamp > most:
            raise OptionError(
                f"inverse_sigma_clamp={options.inverse_sigma_clamp!r} does not fit the matrices: {reason}. Set it to "
                f"at most {math.floor(most)}, or train in bf16"
            )
        longest = max(options.explore_length(*block.shape) for block in layout.blocks)
        if options.explore and longest > most:
            raise OptionError(
                f"explore_scale={options.explore_scale!r} makes directions of length {longest:g} of the matrices: "
                f"{reason}. Set it to at most {options.explore_scale * most / longest:g}, or train in bf16"
            )

    def _level(self, owner: Owner, updated: Tensor | None, device: torch.device, exchange: Exchange) -> Tensor:
        """The mean of log |sigma| over all matrices that move: a gradient came, and they have momentum. Collective."""
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        if updated is not None and owner.blocks:
            norms = torch.cat([_size(self._of_momentum(piece)[2]) for piece in owner.pieces(updated)]).squeeze(-1)
            moving = norms > 0 if self._came is None else (norms > 0) & torch.cat(self._came)
            sums = torch.stack([torch.where(moving, norms, 1.0).log().sum(), moving.sum().double()])
        total, count = exchange.sum(sums)
        return total / count.clamp_min(1)

    def _coefficients(self, core: Tensor, level: Tensor | None) -> Tensor:
        """What the published columns are multiplied by in the update; ``level`` where matrices are balanced.

        Args:
            core: (B, R): sigma (B, r), and for the columns beside U those numbers themselves.
        """
        sigma, beside = core[..., : self.rank], core[..., self.rank :]
        coefficients = live_directions(sigma)
        if self._options.update_rule == "inverse_sigma":
            coefficients = coefficients * sigma.reciprocal().clamp_max(self._options.inverse_sigma_clamp)
        if beside.shape[-1]:
            coefficients = torch.cat([coefficients, beside], dim=-1)
        if level is not None:
            factor = (self._options.balance * (level - _size(sigma).log())).exp()  # without momentum nothing moves
            coefficients = coefficients * factor.clamp(1 / _MOST_BALANCED, _MOST_BALANCED).to(sigma.dtype)
        return coefficients

    def _of_momentum(self, piece: Piece) -> State:
        """Of Y, Z and core what is the momentum's: the first r columns."""
        return tuple(part[..., : self.rank] for part in (piece.Y, piece.Z, piece.core))

    def _batch(self, piece: Piece) -> Batch:
        (U, V, sigma), (Y, Z, _) = piece.state, self._of_momentum(piece)
        return Factors(U, sigma, V), Y, Z

    def _write(self, piece: Piece, came: Tensor, new: Factors, old: Factors) -> None:
        """Over the sketches that they come from, the new factors where a gradient came, else the old ones' bits."""
        left, right, sigma = self._of_momentum(piece)
        for view, one, other in ((left, new.U, old.U), (right, new.V, old.V), (sigma, new.sigma, old.sigma)):
            torch.where(came.view(-1, *[1] * (view.ndim - 1)), one, other, out=view)


def _size(sigma: Tensor) -> Tensor:
    """|sigma|, (B, 1), in float64: the squares of a tiny gradient's are zero in fp32."""
    return torch.linalg.vector_norm(sigma, dim=-1, keepdim=True, dtype=torch.float64)
