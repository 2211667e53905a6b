"""What a method must say to be trained with: its maths on batches of matrices, and which numbers it keeps.

A rule knows no process, buffer, owner or process group; :mod:`ds_mofa.step.driver` knows these, and no method. In every
optimizer step

    backward    takes the sketches Y = G right and Z = G^T left, right and left being the working copies
    reduce      gives them to each matrix's owner; :meth:`Rule.squared_norms`, for clipping
    update      :meth:`Rule.update` turns them into the new left (m x r), right (n x r) and spectrum (r)
    gather      gives these to every rank, the spectrum as :meth:`Rule.coefficients`
    commit      stores what belongs to the state (:attr:`Field.slot`), once every rank has succeeded
    write       W <- W - lr f left diag(coefficients) right^T, with what :meth:`Rule.written` returns
    prepare     :meth:`Rule.last_draw` says whether the next backward sketches with new random matrices

A matrix without a gradient must stay: its state keeps its bits, and the driver publishes zero coefficients for it, by
which every rank knows that it is neither written nor decayed.

A rule's update must be of low rank, and linear in what it needs of the gradient.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_mofa.rules.batch import Field, MatrixBatch, Published

__all__ = ["Rule", "State"]

State = tuple[Tensor, ...]


class Rule(abc.ABC):
    """One way to move matrices by their sketches.

    ``step`` is always the number of optimizer steps before the one at hand. At 0 the working copies hold the Gaussian
    test matrices Psi (m x r) and Omega (n x r), whose elements have variance 1 / r.

    Args:
        r: directions of each matrix, the rank of its factors.
        seed: of all random numbers.

    Attributes:
        name: of the optimizer, as users write it.
        signs: k, columns of random signs beside the r, drawn anew before each backward. Every rank has them in its
            working copies then, and gets them again at the write.
        can_fail: :meth:`update` may raise a ``torch.linalg.LinAlgError``, which skips the step on every rank. Every
            field then needs a slot.
        norm_reads_state: :meth:`squared_norms` needs ``batch.state``.
        capturable: from the second step on, on a GPU, :meth:`squared_norms` and :meth:`update` are the same kernels in every
            step, and read nothing of the host but a clip factor that is no tensor; ``batch.memo`` is not used.
        diagnostics_every: optimizer steps between two reports of :meth:`measures`; 0 for none.
        summaries: how many numbers :meth:`summary` returns.
        redraws: test matrices of some step may still be in the working copies when a state is saved; a load draws them
            once more, and then calls :meth:`restore`.
    """

    name: ClassVar[str]
    can_fail: ClassVar[bool] = False
    norm_reads_state: ClassVar[bool] = False
    capturable: ClassVar[bool] = False
    redraws: ClassVar[bool] = False
    diagnostics_every: int = 0
    summaries: int = 0

    def __init__(self, r: int, seed: int, signs: int = 0):
        self.r, self.seed, self.signs = r, seed, signs

    # ------------------------------------------------------------------ what is kept

    @staticmethod
    @abc.abstractmethod
    def fields(m: int, n: int, r: int) -> tuple[Field, ...]:
        """What the owner of an m x n matrix keeps of it, in fp32."""

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of the state's tensors."""
        return tuple(field.name for field in cls.fields(1, 1, 1))

    @classmethod
    def field_shapes(cls, m: int, n: int, r: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the state's tensors of an m x n matrix."""
        return tuple(field.shape for field in cls.fields(m, n, r))

    @property
    def columns(self) -> int:
        """R, columns of the sketches and the working copies."""
        return self.r + self.signs

    @abc.abstractmethod
    def resized(self, saved: Sequence[State], ranks: set[int]) -> tuple[list[State], str]:
        """A checkpoint's states, one for each matrix, of other ``ranks``, at this run's r; and a line that says what that
        does.

        Raises:
            ValueError: there is no way.
        """

    def completed(self, saved: Mapping[str, Tensor], step: int) -> Mapping[str, Tensor]:
        """One matrix's state in a checkpoint after ``step`` steps, with the fields that an older version did not write."""
        return saved

    def check_shapes(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
        """Raise an OptionError where the options do not fit matrices of these shapes and working copies of ``dtype``."""

    # ------------------------------------------------------------------ a step, in its order

    @abc.abstractmethod
    def squared_norms(self, batches: Sequence[MatrixBatch], step: int) -> Sequence[tuple[Tensor, Any]]:
        """For each batch the squared norm (B,), float64, of what the rule sees of each gradient, and what :meth:`update` may
        reuse.

        It is asked after the first step: in that one |G Omega|^2 has the expectation |G|^2.
        """

    @abc.abstractmethod
    def update(self, batches: Sequence[MatrixBatch], reused: Sequence[Any], *, step: int, clip: float | Tensor) -> None:
        """Overwrite Y, Z and spectrum of each batch with the new left, right and spectrum.

        Args:
            batches: so many as fit into ``update_bytes`` of temporaries.
            reused: what :meth:`squared_norms` returned for each; in the first step None.
            clip: factor on the gradient, <= 1.

        Raises:
            torch.linalg.LinAlgError: only where ``can_fail``.
        """

    def summary(self, spectrum: Tensor, came: Tensor) -> Tensor:
        """Numbers of a batch that are summed over all matrices for :meth:`coefficients`; (summaries,), float64. It is
        asked where :attr:`summaries` is not 0.

        Args:
            spectrum: (B, R).
            came: (B,), which matrices had a gradient.
        """
        raise NotImplementedError(f"{self.name}: write summary(), or leave summaries at 0")

    def coefficients(self, spectrum: Tensor, total: Tensor | None) -> Tensor:
        """What each published column is multiplied by in the update, (B, R).

        Args:
            spectrum: (B, R), of all of an owner's matrices, whatever their shapes.
            total: the sum of all :meth:`summary`; None without.
        """
        return spectrum

    def measures(self, state: State, reused: Any, spectrum: Tensor, clip: float | Tensor) -> Tensor:
        """:data:`ds_mofa.rules.diagnostics.MEASURES` (B, measures), float64, of a batch's update. It is asked where
        :attr:`diagnostics_every` is not 0.

        Args:
            state: before the update, where it is kept, which may be the host.
            reused: what :meth:`squared_norms` returned for it.
            spectrum: (B, R), of the update.
        """
        raise NotImplementedError(f"{self.name}: write measures(), or leave diagnostics_every at 0")

    def previous(self, shape: tuple[int, int], left: Tensor, right: Tensor, step: int) -> Tensor | None:
        """What of the working copies before the update :meth:`written` needs; None where it needs nothing."""
        return None

    def written(self, published: Published) -> tuple[Tensor, Tensor, Tensor]:
        """left (B, m, c), right (B, n, c) and coefficients (B, c) of the update of W, for any c."""
        return published.left, published.right, published.coefficients

    @abc.abstractmethod
    def lr_factor(self, m: int, n: int) -> float:
        """What lr is multiplied by for a linear map of n inputs and m outputs."""

    # ------------------------------------------------------------------ the working copies of the next backward

    def last_draw(self, step: int) -> int:
        """The last step, at most ``step``, before which test matrices are drawn. All rules draw some before step 0."""
        return 0

    def drawn(self, shape: tuple[int, int], left: Tensor, right: Tensor, step: int) -> tuple[Tensor, ...]:
        """Which of a batch's working copies (B, ., R) are drawn before ``step``: views of them."""
        return left[..., : self.r], right[..., : self.r]

    def restore(self, shape: tuple[int, int], state: State, left: Tensor, right: Tensor, spectrum: Tensor) -> None:
        """Write a loaded state into a batch's working copies: by default each field with a slot."""
        slots = {"left": left, "right": right, "spectrum": spectrum}
        for field, value in zip(self.fields(*shape, self.r), state, strict=True):
            if field.slot is not None:
                slots[field.slot][..., : self.r] = value
