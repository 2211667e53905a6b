"""Drives a rule's maths over the matrices of one rank: what every method shares between its sketches and its writes.

:class:`RuleDriver` hands a rule batches of matrices (:mod:`ds_mofa.rules.batch`), which are views of flat buffers, and
does with the results what ranks need: publishes them in the working copies, commits or rolls them back the same on
every rank, and restores them from a checkpoint. It knows no method.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_mofa.kernels import triton_serves
from ds_mofa.kernels.random_bits import Rounding, rounding_key
from ds_mofa.linalg.factors import gradient_came
from ds_mofa.partition.exchange import Exchange
from ds_mofa.partition.layout import Block, FactorSegment, Layout, SketchSegment
from ds_mofa.partition.subbatches import Part
from ds_mofa.rules.batch import MatrixBatch, Published
from ds_mofa.rules.diagnostics import MEASURES
from ds_mofa.rules.rule import Rule
from ds_mofa.step.owner import Owner, Piece
from ds_mofa.step.signs import SignColumns

__all__ = ["RuleDriver"]


class _Measured(NamedTuple):
    """What the norm has found of each piece, for the update to reuse.

    Attributes:
        squares: (B,) of each, float64.
        came: (B,) of each.
        reused: the rule's own.
    """

    squares: list[Tensor]
    came: list[Tensor]
    reused: list[Any]


class RuleDriver:
    """One rule over one rank's matrices.

    ``pending`` is this rank's segment of the mean sketches, and ``new`` the same memory once :meth:`update` has
    overwritten it with factors. ``step`` counts the optimizer steps before the one at hand.

    Args:
        rule: the maths.
        owner: this rank's matrices.
        working: the working copies of all matrices, flat.
        exchange: the collectives.
        update_bytes: bound on temporaries.

    Raises:
        TypeError: the rule may fail, and writes state in place, which could not be rolled back.
    """

    def __init__(self, rule: Rule, owner: Owner, working: Tensor, exchange: Exchange, update_bytes: float):
        self.rule, self._owner, self._working, self._exchange = rule, owner, working, exchange
        self._layout = owner.layout
        self._fields = rule.fields(1, 1, 1)
        self._in_place = any(field.slot is None for field in self._fields)
        if rule.can_fail and self._in_place:
            raise TypeError(
                f"{rule.name}: give every field a slot, or set can_fail to False: state in place stays as it is"
            )
        self._committed_whole = rule.signs == 0 and [f.slot for f in self._fields] == ["left", "right", "spectrum"]
        self._memos: dict[Part, dict[str, Any]] = {}
        self._measured: _Measured | None = None
        self._came: list[Tensor] | None = None  # of each piece, from the update on
        self._previous: dict[int, Tensor] = {}  # by the block's offset
        self._signs = None
        if rule.signs:
            self._signs = SignColumns(self._layout, rule.r, rule.seed, update_bytes, working.device)

    def held(self) -> list[Tensor]:
        """What every rank keeps besides the working copies, for no checkpoint."""
        return [] if self._signs is None else self._signs.held()

    # ------------------------------------------------------------------ a step, in its order

    def squared_norm(self, pending: SketchSegment, step: int) -> Tensor:
        """Squared norm of what the rule sees of this rank's gradients, 0-dim. NaN or Inf where a sketch holds one."""
        self.forget()
        if step == 0:
            if not self.rule.signs:
                return pending.square().sum() / 2  # E |G Omega|^2 = |G|^2, and the same of the other sketch
            seen = (part.square().sum() for piece in self._owner.pieces(pending) for part in self._sketches(piece))
            return sum(seen, pending.new_zeros(())) / 2 + 0 * pending.sum()
        passes: Iterable[list[Piece]] = [list(self._owner.pieces(pending))]
        if self.rule.norm_reads_state:
            passes = self._owner.passes(pending)
        self._measured = _Measured([], [], [])
        for pieces in passes:
            came = [gradient_came(piece.Y, piece.Z) for piece in pieces]
            found = self.rule.squared_norms([self._batch(*each) for each in zip(pieces, came)], step)
            for one, (squares, reused) in zip(came, found, strict=True):
                for kept, value in zip(self._measured, (squares, one, reused), strict=True):
                    kept.append(value)
        nothing = pending.new_zeros(0, dtype=torch.float64)  # an owner of no matrix adds up in the others' dtype
        return torch.cat([nothing, *self._measured.squares]).sum()

    def squared_norms(self, pending: SketchSegment, step: int) -> list[Tensor]:
        """:meth:`squared_norm` of each matrix, (B,) for each of the owner's pieces. Call it after that method."""
        if step == 0:
            sketches = (self._sketches(piece) for piece in self._owner.pieces(pending))
            return [(_squares(Y) + _squares(Z)) / 2 for Y, Z in sketches]
        assert self._measured is not None  # squared_norm has measured
        return self._measured.squares

    def update(self, pending: SketchSegment, step: int, clip: float | Tensor) -> FactorSegment:
        """Have the rule overwrite the sketches with the factors to be published, and return these.

        Raises:
            torch.linalg.LinAlgError: the state is as it was; ``pending`` then holds neither sketches nor factors.
        """
        self._keep_previous(step)
        known = self._measured
        came = iter(known.came if known is not None else ())
        reused = iter(known.reused if known is not None else ())
        self._came = []
        for pieces in self._passes(pending, step):
            found = [next(came, None) for _ in pieces]
            arrived = [gradient_came(p.Y, p.Z) if one is None else one for p, one in zip(pieces, found)]
            batches = [self._batch(piece, one) for piece, one in zip(pieces, arrived)]
            self.rule.update(batches, [next(reused, None) for _ in pieces], step=step, clip=clip)
            self._came += arrived
        return FactorSegment(pending)

    def publish(self, new: FactorSegment | None) -> None:
        """Write this rank's part of the working copies: left, right and coefficients. Collective.

        Args:
            new: None where :meth:`update` has raised: the coefficients are NaN then, which tells the other ranks by
                the all-gather that is made anyway.
        """
        total = self._total(new)
        if new is None:
            for block in self._owner.blocks:
                block.views(self._working)[2].fill_(math.nan)
            return
        pieces = list(self._owner.pieces(new))
        if not pieces:
            return
        self._working.narrow(0, self._exchange.rank * self._layout.segment, self._layout.segment).copy_(new)
        coefficients = self.rule.coefficients(torch.cat([piece.spectrum for piece in pieces]), total)
        if self._came is not None:
            coefficients = torch.where(torch.cat(self._came).unsqueeze(-1), coefficients, 0)
        for piece, own in zip(pieces, coefficients.split([len(piece.spectrum) for piece in pieces])):
            piece.part.views(self._working)[2].copy_(own)

    def failed(self, step: int) -> bool:
        """Whether the gathered working copies say that an owner's update has raised; the same on every rank."""
        if not self.rule.can_fail or step > 0 and triton_serves(self._working):
            return False  # Triton's SVD raises nothing, and the host need not wait for the gathered coefficients
        coefficients = [block.views(self._working)[2] for block in self._layout.blocks]
        return not bool(torch.stack([torch.isfinite(part).all() for part in coefficients]).all())

    def roll_back(self) -> None:
        """After :meth:`failed`: :meth:`publish` once more, from the state before the step. Collective."""
        segment = self._layout.segment
        kept = FactorSegment(torch.zeros(segment, dtype=self._owner.state.dtype, device=self._working.device))
        for piece in itertools.chain.from_iterable(self._owner.passes(kept)):
            for value, slot in zip(piece.state, self._slots(piece), strict=True):
                assert slot is not None  # every field of a rule that can fail has one
                slot.copy_(value)
        self._came = None
        self.publish(kept)

    def commit(self, new: FactorSegment) -> None:
        """The step is certain: store what belongs to the state."""
        if self._committed_whole:
            self._owner.store(new)
        elif any(field.slot is not None for field in self._fields):
            for piece in itertools.chain.from_iterable(self._owner.passes(new, back=True)):
                for value, slot in zip(piece.state, self._slots(piece), strict=True):
                    if slot is not None:
                        value.copy_(slot)

    @property
    def measured(self) -> Any:
        """What :meth:`squared_norm` has kept for :meth:`update`."""
        return self._measured

    def recall(self, measured: Any) -> None:
        """Take what was :attr:`measured` for that of the last :meth:`squared_norm`."""
        self._measured, self._came = measured, None

    def forget(self) -> None:
        """Drop what :meth:`squared_norm` has kept for :meth:`update`, and what that has for :meth:`publish`."""
        self._measured = self._came = None

    def measures(self, new: FactorSegment, clip: float | Tensor) -> Tensor | None:
        """:meth:`Rule.measures` of this rank's among all matrices, zero for the others', float64. Call it before
        :meth:`commit`. None where there are none.
        """
        if self._measured is None:
            return None
        values = torch.zeros(self._layout.matrices, len(MEASURES), dtype=torch.float64, device=new.device)
        kept = zip(self._owner.kept(), self._owner.pieces(new), self._measured.reused, strict=True)
        for (part, state), piece, reused in kept:
            measured = self.rule.measures(state, reused, piece.spectrum, clip)
            for span, own in part.cut(measured):
                values[span.number : span.number + span.count] = own
        return values

    # ------------------------------------------------------------------ the write

    def parts(self, block: Block) -> list[Part]:
        """The matrices of ``block``, so many at a time as are to be written together."""
        return [Part(block, 0, block.count)] if self._signs is None else self._signs.parts(block)

    def written(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """left (B, m, c), right (B, n, c) and coefficients (B, c) of the update of W, on every rank. The coefficients of
        a matrix that stays are all zero.
        """
        left, right, coefficients = part.views(self._working)
        previous = self._previous.get(part.block.offset)
        if previous is not None:
            previous = previous[part.first : part.last]
        signs = None if self._signs is None else self._signs.of(part)
        return self.rule.written(Published(part.block.shape, left, right, coefficients, previous, signs))

    # ------------------------------------------------------------------ the working copies of the next backward

    def prepare(self, step: int) -> None:
        """Make the working copies what the next backward sketches with: after each write, a start, or a load.

        Raises:
            OptionError: see :meth:`Rule.check_shapes`.
        """
        self._previous.clear()
        if step == 0:
            self._memos.clear()
            self.rule.check_shapes([block.shape for block in self._layout.blocks], self._working.dtype)
        if self.rule.last_draw(step) == step:
            self._draw(step)
        if self._signs is not None:
            self._signs.draw(self._working, step)

    def restore(self, state_layout: Layout, state: Tensor, step: int) -> None:
        """The working copies from the whole of a loaded state, on every rank. :meth:`prepare` comes after it."""
        self._memos.clear()
        if self.rule.redraws:
            for draw in sorted({0, self.rule.last_draw(step)}):
                self._draw(draw)
        for saved, block in zip(state_layout.blocks, self._layout.blocks, strict=True):
            self.rule.restore(block.shape, saved.views(state), *block.views(self._working))

    # ------------------------------------------------------------------ parts

    def _passes(self, pending: SketchSegment, step: int) -> Iterator[list[Piece]]:
        """What :meth:`Rule.update` gets at a time. Before the first step there is no state to read."""
        if step == 0 and not self._in_place:
            return ([piece] for piece in self._owner.pieces(pending))
        return self._owner.passes(pending, back=self._in_place)

    def _batch(self, piece: Piece, came: Tensor) -> MatrixBatch:
        part = piece.part
        left, right, _ = part.views(self._working)
        memo = self._memos.setdefault(part, {})
        return MatrixBatch(part.block.shape, piece.state, left, right, piece.Y, piece.Z, piece.spectrum, came, memo)

    def _sketches(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Of Y and Z what was sketched along the r columns."""
        return piece.Y[..., : self.rule.r], piece.Z[..., : self.rule.r]

    def _slots(self, piece: Piece) -> list[Tensor | None]:
        """Where the new value of each field stands."""
        found = {"left": piece.Y, "right": piece.Z, "spectrum": piece.spectrum}
        return [None if field.slot is None else found[field.slot][..., : self.rule.r] for field in self._fields]

    def _keep_previous(self, step: int) -> None:
        for block in self._layout.blocks:
            left, right, _ = block.views(self._working)
            kept = self.rule.previous(block.shape, left, right, step)
            if kept is not None:
                self._previous[block.offset] = kept.clone()

    def _total(self, new: FactorSegment | None) -> Tensor | None:
        """The sum of the rule's summaries over all matrices; None where it has none. Collective."""
        if not self.rule.summaries:
            return None
        total = torch.zeros(self.rule.summaries, dtype=torch.float64, device=self._working.device)
        if new is not None:
            for i, piece in enumerate(self._owner.pieces(new)):
                came = torch.ones_like(piece.spectrum[:, 0], dtype=torch.bool) if self._came is None else self._came[i]
                total += self.rule.summary(piece.spectrum, came)
        return self._exchange.sum(total)

    def _draw(self, step: int) -> None:
        """Gaussian test matrices of variance 1 / r, so that |G Omega| ~ |G|: the same on every rank."""
        for block in self._layout.blocks:
            left, right, _ = block.views(self._working)
            views = self.rule.drawn(block.shape, left, right, step)
            for i, number in enumerate(block.numbers):  # a stack's are drawn together
                generator = torch.Generator().manual_seed(rounding_key(Rounding(False, self.rule.seed, step), number))
                for view in views:
                    own = view[i * block.each : (i + 1) * block.each]
                    drawn = torch.randn(own.shape, generator=generator, dtype=torch.float32, device="cpu")
                    own.copy_(drawn / math.sqrt(self.rule.r))


def _squares(sketches: Tensor) -> Tensor:
    """Squared norm of each of (B, ., r) sketches, (B,), float64."""
    return sketches.double().square().sum((-2, -1))
