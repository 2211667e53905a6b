"""GaLore's rule (arXiv 2403.03507) without a gradient: Adam on P^T G, which is a sketch, in a basis from another one.

Seen wide (G s x l, s <= l; a tall or square matrix transposed), the basis P (s x r) stands where U does in MoFaSGD, so that
the sketch of the long side is the projected gradient; Adam's direction of it stands in that of V in the write:

    R^T = G^T P    (l x r)      m' = b1 m + (1 - b1) R^T      v' = b2 v + (1 - b2) R^T^2      elementwise
    N = m' / (1 - b1^t)  /  (sqrt(v' / (1 - b2^t)) + eps)     W <- W - lr alpha P N^T

Every T steps GaLore takes P from an SVD of all of G. Here, before the backward of such a step, every rank overwrites
the long side's working copies by the same seeded Gaussian Omega (l x r), so that the other sketch is

    Y = G Omega    (s x r)      P' = the left singular vectors of Y

That step still moves by the old P, whose R it has; P' is published with it and in force from the next step on. So no
gradient is kept, and no collective is added. As in GaLore a refresh changes neither m nor v, and the vectors have
GaLore's order and sign: Adam is elementwise, and other axes of one subspace would be another method.

A matrix's first gradient has no P to be projected by. It chooses one, and moves nothing (but for weight decay); t
counts the matrix's gradients from the second on. A matrix without a gradient does nothing in that step, and before its
first one the test matrices Psi and Omega stay in its working copies.

A one-pass estimate of P^T G in the first step would need half of the columns for its own conditioning
(:func:`ds_mofa.linalg.factors.start_factors`), and feed Adam's second moment, which remembers 1 / (1 - b2) steps, with it.

Measured along the training of a byte-level LLaMA by AdamW (experiments/configs/studies/lm.yaml: 1.7 M parameters, 28
matrices of 64 to 512, 250 steps, T = 50, one seed): |P^T G| / |G|, the mean over the matrices, at the refreshes for the
gradient that P' comes from, and in force for the gradients that it then meets. Instead of Omega were tried the last
step's N, which stands there anyhow, half of each, and the last step's R^T, which would have to be sent:

                       at the refreshes, r = 8 / 32     in force, r = 8 / 32
    SVD of G           0.990 / 1.000                    0.788 / 0.917
    G Omega            0.968 / 0.999                    0.757 / 0.911
    G N                0.975 / 0.999                    0.757 / 0.911
    half of each       0.973 / 0.999                    0.757 / 0.911
    G R^T              0.978 / 0.999                    0.759 / 0.911

What the past helps at a refresh is gone in force, so it is Omega: it keeps nothing, sends nothing, and does not tie a
subspace to the one before.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_mofa.linalg.factors import leading_svd
from ds_mofa.linalg.orthonormal import Side, complements
from ds_mofa.options import GaLoreOptions
from ds_mofa.rules.batch import Field, MatrixBatch, Published
from ds_mofa.rules.rule import Rule, State

__all__ = ["GaLoreRule", "basis_of"]

logger = logging.getLogger("ds_mofa")


class GaLoreRule(Rule):
    """The state of an m x n matrix is P (s, r), gradients (1,), which counts them, m and v (l, r); before the first
    gradient all zero. It is written in place, for nothing of the update can fail on one rank alone.

    During a step that refreshes, every rank also holds the old P of all matrices, in the compute dtype.
    """

    name = "GaLore"
    redraws = True

    def __init__(self, options: GaLoreOptions):
        super().__init__(options.rank, options.seed)
        self._options = options

    @staticmethod
    def fields(m: int, n: int, r: int) -> tuple[Field, ...]:
        s, l = sorted((m, n))  # noqa: E741
        return Field("P", (s, r)), Field("gradients", (1,)), Field("m", (l, r)), Field("v", (l, r))

    def squared_norms(self, batches: Sequence[MatrixBatch], step: int) -> list[tuple[Tensor, None]]:
        return [(self._squared_norm(batch, step), None) for batch in batches]

    def _squared_norm(self, batch: MatrixBatch, step: int) -> Tensor:
        short, long = _sides(batch.shape, batch.Y, batch.Z)
        square = _square(long)
        if self._refreshes(step) or _may_wait(batch):  # a NaN or Inf there must not become a basis
            square = square + 0 * _square(short)
        return square

    def update(self, batches: Sequence[MatrixBatch], reused: Sequence[Any], *, step: int, clip: float | Tensor) -> None:
        for batch in batches:
            self._update(batch, clip, self._refreshes(step))

    def _update(self, batch: MatrixBatch, clip: float | Tensor, refreshes: bool) -> None:
        P, gradients, m, v = batch.state
        short, long = _sides(batch.shape, batch.Y, batch.Z)
        came = batch.came[:, None, None]
        begun = gradients.unsqueeze(-1) > 0
        self._adam(m, v, long.mul_(clip), gradients.unsqueeze(-1), came & begun)
        waited = _may_wait(batch)
        chooses = came if refreshes else came & ~begun
        if refreshes or waited and bool(chooses.any()):
            torch.where(chooses, basis_of(short), P, out=P)
        if waited:
            known = came | begun
            batch.memo["may_wait"] = not bool(known.all())
            for sketch, view in zip((batch.Y, batch.Z), (batch.left, batch.right)):  # those that wait keep theirs
                torch.where(known, sketch, view.to(sketch.dtype), out=sketch)
            torch.where(known, P, short, out=short)
        else:
            short.copy_(P)
        gradients.add_(came.squeeze(-1))
        batch.spectrum.fill_(1)

    def _adam(self, m: Tensor, v: Tensor, R: Tensor, t: Tensor, moves: Tensor) -> None:
        """Move the moments of those that move, (B, 1, 1), by R, and write the direction over it; t is (B, 1, 1)."""
        decays, corrections = [], []
        for beta in self._options.betas:
            decays.append(torch.pow(beta, moves.double()).to(m.dtype))
            corrections.append((1 - torch.pow(beta, t.double().clamp_min(1))).to(m.dtype))
        (decay1, decay2), (left1, left2) = decays, corrections
        beta1, beta2 = self._options.betas
        R.mul_(moves)
        m.mul_(decay1).add_(R, alpha=1 - beta1)
        v.mul_(decay2).addcmul_(R, R, value=1 - beta2)
        root = (v / left2).sqrt_().add_(self._options.eps)
        torch.div(m, left1, out=R).div_(root)

    def previous(self, shape: tuple[int, int], left: Tensor, right: Tensor, step: int) -> Tensor | None:
        """The P that a refreshing step still moves by."""
        return _sides(shape, left, right)[0] if step > 0 and self._refreshes(step) else None

    def written(self, published: Published) -> tuple[Tensor, Tensor, Tensor]:
        shape, left, right, coefficients, previous, _ = published
        if previous is None:
            return left, right, coefficients
        return *((previous, right) if _is_wide(shape) else (left, previous)), coefficients

    def lr_factor(self, m: int, n: int) -> float:
        return self._options.alpha

    def last_draw(self, step: int) -> int:
        return step - step % self._options.refresh_every

    def drawn(self, shape: tuple[int, int], left: Tensor, right: Tensor, step: int) -> tuple[Tensor, ...]:
        """Before a refresh new test matrices for the long side."""
        return super().drawn(shape, left, right, step) if step == 0 else _sides(shape, left, right)[1:]

    def restore(self, shape: tuple[int, int], state: State, left: Tensor, right: Tensor, spectrum: Tensor) -> None:
        """P, for those matrices that have one; of the others the test matrices stay."""
        short, _ = _sides(shape, left, right)
        P, gradients, *_ = state
        short.copy_(torch.where(gradients.unsqueeze(-1) > 0, P, short.to(P.dtype)))

    def completed(self, saved: Mapping[str, Tensor], step: int) -> Mapping[str, Tensor]:
        """A state without the count of a matrix's gradients is from when every step was one."""
        if "gradients" in saved or not isinstance(saved.get("m"), Tensor):
            return saved
        return {**saved, "gradients": saved["m"].new_full((1,), float(step))}

    def resized(self, saved: Sequence[State], ranks: set[int]) -> tuple[list[State], str]:
        were = ", ".join(map(str, sorted(ranks)))
        raise ValueError(
            f"the checkpoint's bases have rank {were}, this run's {self.r}, and GaLore's moments mean nothing in "
            f'other directions. Set "rank" to {were}, or take its weights alone (load_optimizer_states=False)'
        )

    def _refreshes(self, step: int) -> bool:
        """Whether the step after so many others chooses P: GaLore's steps 1, T + 1, 2 T + 1, ..."""
        return step % self._options.refresh_every == 0


def _may_wait(batch: MatrixBatch) -> bool:
    """Whether a matrix of this batch may be without a gradient so far. The host waits to know, once for most."""
    return batch.memo.get("may_wait", True)


def _square(sketch: Tensor) -> Tensor:
    """Squared norm of each matrix's sketch, (B,), float64."""
    return torch.linalg.vector_norm(sketch, dim=(-2, -1), dtype=torch.float64).square()


def basis_of(Y: Tensor) -> Tensor:
    """The left singular vectors of Y (B, s, r), orthonormal, in their order; where Y has lost rank, others besides.

    Each one's entry of largest magnitude is positive, so that machines agree.
    """
    [side] = complements([Side(Y[..., :0], Y)])
    r = Y.shape[-1]
    try:
        turn, _, _ = leading_svd(side.R.to(Y.dtype), r)
    except torch.linalg.LinAlgError as error:
        logger.warning("ds_mofa: the new basis of %d matrices keeps the axes of its own making: %s", len(Y), error)
        turn = torch.eye(r, dtype=torch.float64, device=Y.device).expand(len(Y), r, r)
    P = side.turned(turn)
    largest = P.gather(-2, P.abs().argmax(dim=-2, keepdim=True))
    return torch.where(largest < 0, -P, P)


def _is_wide(shape: tuple[int, int]) -> bool:
    return shape[0] < shape[1]


def _sides(shape: tuple[int, int], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(short, long) of an m x n matrix's two sides."""
    return (left, right) if _is_wide(shape) else (right, left)
