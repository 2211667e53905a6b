"""MoFaSGD's rule: :mod:`ds_mofa.linalg.factors` on the owner's factors, and U diag(coefficients) V^T for everyone; with
``explore`` also what :mod:`ds_mofa.linalg.exploring` finds beside them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_mofa.linalg.batching import together
from ds_mofa.linalg.exploring import look_grams
from ds_mofa.linalg.factors import (
    Batch,
    Factors,
    Grams,
    gram_matrices,
    live_directions,
    projected_norm,
    resized,
    start_factors,
    update_many,
    waiting_factors,
)
from ds_mofa.options import OptionError, Options
from ds_mofa.rules.batch import Field, MatrixBatch, Published
from ds_mofa.rules.diagnostics import measure
from ds_mofa.rules.exploration import explore, stay, with_signs
from ds_mofa.rules.rule import Rule, State

__all__ = ["MoFaSGDRule"]

_MOST_BALANCED = 10.0  # a matrix whose gradients are nearly zero, an expert of few tokens, has hardly any momentum


class Seen(NamedTuple):
    """What the norm has looked up of a batch, float64.

    Attributes:
        grams: of [U Y] and [V Z], in the momentum's columns.
        beside: of each side what these have in common with the explored columns; empty where there are none.
    """

    grams: Grams
    beside: tuple[Tensor, ...]


class MoFaSGDRule(Rule):
    """The state is the momentum's U, V and sigma; what is published of it are the same numbers, and the coefficients."""

    name = "MoFaSGD"
    can_fail = True
    norm_reads_state = True
    capturable = True

    def __init__(self, options: Options):
        super().__init__(options.rank, options.seed, signs=options.explore)
        self.summaries = 2 if options.balance else 0
        self.diagnostics_every = options.diagnostics_every
        self._options = options

    @staticmethod
    def fields(m: int, n: int, r: int) -> tuple[Field, ...]:
        return Field("U", (m, r), "left"), Field("V", (n, r), "right"), Field("sigma", (r,), "spectrum")

    def squared_norms(self, batches: Sequence[MatrixBatch], step: int) -> list[tuple[Tensor, Seen]]:
        seen = [self._seen(batch) for batch in batches]
        squares = together([(*own.grams, *own.beside) for own in seen], _squares)
        return [(square, own) for (square,), own in zip(squares, seen)]

    def update(
        self, batches: Sequence[MatrixBatch], reused: Sequence[Seen], *, step: int, clip: float | Tensor
    ) -> None:
        beta, gamma = self._options.beta, self._options.gamma * clip  # a clipped gradient is a lighter one
        if step == 0:
            for batch in batches:
                self._start(batch, gamma)
            return
        if self.signs:
            looks = [list(zip(seen.grams, seen.beside)) for seen in reused]
            explore(batches, self.r, self._options.explore_length, looks)
        momenta = [self._momentum(batch) for batch in batches]
        updated = update_many(momenta, beta=beta, gamma=gamma, grams=[seen.grams for seen in reused])
        for batch, new, (old, _, _) in zip(batches, updated, momenta, strict=True):
            self._write(batch, new, old)

    def summary(self, spectrum: Tensor, came: Tensor) -> Tensor:
        """For ``balance``: the sum of log |sigma| over the matrices that move, which have a gradient and momentum, and
        their number.
        """
        norms = _size(spectrum[..., : self.r]).squeeze(-1)
        moving = (norms > 0) & came
        return torch.stack([torch.where(moving, norms, 1.0).log().sum(), moving.sum().double()])

    def coefficients(self, spectrum: Tensor, total: Tensor | None) -> Tensor:
        sigma, beside = spectrum[..., : self.r], spectrum[..., self.r :]
        coefficients = live_directions(sigma)
        if self._options.update_rule == "inverse_sigma":
            coefficients = coefficients * sigma.reciprocal().clamp_max(self._options.inverse_sigma_clamp)
        if self.signs:
            coefficients = torch.cat([coefficients, beside], dim=-1)
        if total is not None:
            level = total[0] / total[1].clamp_min(1)  # the mean of log |sigma|
            factor = (self._options.balance * (level - _size(sigma).log())).exp()  # without momentum nothing moves
            coefficients = coefficients * factor.clamp(1 / _MOST_BALANCED, _MOST_BALANCED).to(sigma.dtype)
        return coefficients

    def measures(self, state: State, reused: Seen, spectrum: Tensor, clip: float | Tensor) -> Tensor:
        beta, gamma = self._options.beta, self._options.gamma * clip
        old = state[2].to(spectrum.device)
        return measure(old, *reused.grams, spectrum[..., : self.r], beta=beta, gamma=gamma)

    def written(self, published: Published) -> tuple[Tensor, Tensor, Tensor]:
        _, left, right, coefficients, _, signs = published
        return (left, right, coefficients) if signs is None else with_signs(left, right, coefficients, self.r, signs)

    def lr_factor(self, m: int, n: int) -> float:
        return self._options.shape_factor(m, n)

    def resized(self, saved: Sequence[State], ranks: set[int]) -> tuple[list[State], str]:
        """See :func:`ds_mofa.linalg.factors.resized`."""
        new: list[State] = []
        kept = torch.zeros(2, dtype=torch.float64, device="cpu")  # squares of sigma: after and before
        for U, V, sigma in saved:
            one = resized(Factors(U, sigma, V), self.r)
            kept += torch.stack([one.sigma.double().square().sum(), sigma.double().square().sum()])
            new.append((one.U, one.V, one.sigma))
        if max(ranks) < self.r:
            effect = "grown by directions without momentum, which the next gradients fill"
        else:
            effect = f"truncated to the leading ones, which hold {float(kept[0] / kept[1].clamp_min(1e-300)):.4%} of "
            effect += "the momentum's squared norm"
        were = ", ".join(map(str, sorted(ranks)))
        return new, f"the checkpoint's factors have rank {were}, this run's {self.r}: {effect}"

    def check_shapes(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
        """Refuse coefficients that may be larger than ``dtype`` can hold."""
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
        longest = max(options.explore_length(*shape) for shape in shapes)
        if options.explore and longest > most:
            raise OptionError(
                f"explore_scale={options.explore_scale!r} makes directions of length {longest:g} of the matrices: "
                f"{reason}. Set it to at most {options.explore_scale * most / longest:g}, or train in bf16"
            )

    # ------------------------------------------------------------------ parts

    def _start(self, batch: MatrixBatch, gamma: float | Tensor) -> None:
        """The first factors, from sketches with the test matrices."""
        Y, Z, _ = self._columns(batch)
        psi, omega = (view[..., : self.r].to(Y.dtype) for view in (batch.left, batch.right))
        new = start_factors(*(part.contiguous() for part in (Y, Z, psi)), gamma=gamma)
        self._write(batch, new, waiting_factors(psi, omega))
        if self.signs:
            stay(batch, self.r)

    def _columns(self, batch: MatrixBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Of Y, Z and spectrum the momentum's: the first r columns."""
        return batch.Y[..., : self.r], batch.Z[..., : self.r], batch.spectrum[..., : self.r]

    def _momentum(self, batch: MatrixBatch) -> Batch:
        (U, V, sigma), (Y, Z, _) = batch.state, self._columns(batch)
        return Factors(U, sigma, V), Y, Z

    def _seen(self, batch: MatrixBatch) -> Seen:
        momentum = self._momentum(batch)
        if not self.signs:
            return Seen(gram_matrices(*momentum), ())
        U, _, V = momentum[0]
        (left, near), (right, far) = look_grams(U, batch.Y), look_grams(V, batch.Z)
        return Seen((left, right), (near, far))

    def _write(self, batch: MatrixBatch, new: Factors, old: Factors) -> None:
        """The new factors where a gradient came, else the old ones' bits."""
        left, right, sigma = self._columns(batch)
        for view, one, other in ((left, new.U, old.U), (right, new.V, old.V), (sigma, new.sigma, old.sigma)):
            torch.where(batch.came.view(-1, *[1] * (view.ndim - 1)), one, other, out=view)


def _squares(left: Tensor, right: Tensor, *beside: Tensor) -> tuple[Tensor]:
    """The norm is of the momentum's columns; a NaN or Inf in any other one is to be seen in it."""
    square = projected_norm(left, right)
    for one in beside:
        square = square + 0 * one.sum((-2, -1))
    return (square,)


def _size(sigma: Tensor) -> Tensor:
    """|sigma|, (B, 1), in float64: the squares of a tiny gradient's are zero in fp32."""
    return torch.linalg.vector_norm(sigma, dim=-1, keepdim=True, dtype=torch.float64)
