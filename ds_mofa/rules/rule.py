"""What an update rule is to the step that carries it (:class:`ds_mofa.step.MatrixStep`): its maths and its state.

The step knows ranks, buffers and weights. In every optimizer step it

    sketches    Y = G V and Z = G^T U in backward, U and V being what stands in the working copies
    reduces     them to each matrix' owner; :meth:`Rule.square_norm`, for clipping
    updates     the owner's state, :meth:`Rule.update`, and what it publishes, :meth:`Rule.publish`
    gathers     the published left (m x r), right (n x r) and coefficients (r) on every rank
    writes      W <- W - lr f left diag(coefficients) right^T, with what :meth:`Rule.written` returns
    prepares    the working copies for the next backward, :meth:`Rule.prepare`: without communication

A matrix whose sketches are both zero has had no gradient: its state stays, and its coefficients are published as zeros,
by which every rank knows that it is not to be written, nor decayed.

So what is published, what is kept and what sketches need not be the same columns. A rule's update must be linear in
what it needs of the gradient, and of low rank. What is sent has r columns, or more where :attr:`Rule.columns` says so.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ds_mofa.partition import Exchange, Layout, Shapes
from ds_mofa.subbatches import Part
from ds_mofa.weights import Rounding, rounding_key

if TYPE_CHECKING:
    from ds_mofa.owner import Owner
    from ds_mofa.partition import Block

__all__ = ["Rule", "State"]

State = tuple[Tensor, ...]


class Rule(abc.ABC):
    """One way to move matrices by their sketches.

    ``steps`` is always the number of optimizer steps that were taken before the one at hand; with 0 the working copies
    hold the Gaussian test matrices Psi (m x r) and Omega (n x r) of :meth:`prepare`.

    Attributes:
        name: of the optimizer, as users write it.
        fields: names of the state's tensors in a checkpoint, in the order of :meth:`tensors`.
        columns: of the sketches and the working copies; the state has ``rank``.
        diagnostics_every: optimizer steps between two reports of :meth:`measures`; 0 for none.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    diagnostics_every: int = 0

    def __init__(self, rank: int, seed: int):
        self.rank, self.seed = rank, seed

    @property
    def columns(self) -> int:
        return self.rank

    # ------------------------------------------------------------------ what is kept

    @staticmethod
    @abc.abstractmethod
    def tensors(m: int, n: int, r: int) -> Shapes:
        """Shapes of what the owner of an m x n matrix keeps of it, in fp32."""

    @abc.abstractmethod
    def resized(self, saved: Sequence[State], ranks: set[int]) -> tuple[list[State], str]:
        """A checkpoint's states, of other ``ranks``, at this run's rank; and a line that says what that does.

        Raises:
            ValueError: there is no way.
        """

    def completed(self, saved: Mapping[str, Tensor], steps: int) -> Mapping[str, Tensor]:
        """One matrix' state in a checkpoint after ``steps`` steps, with the :attr:`fields` that it may lack."""
        return saved

    def held(self) -> list[Tensor]:
        """What every rank keeps besides, for no checkpoint."""
        return []

    # ------------------------------------------------------------------ a step, in its order

    def square_norm(self, owner: "Owner", reduced: Tensor, steps: int) -> Tensor:
        """Squared norm of what the rule sees of this rank's gradients, 0-dim."""
        if steps == 0:  # E |G Omega|^2 = |G|^2, and the same of the other sketch
            return reduced.square().sum() / 2
        return self.projected_square(owner, reduced, steps)

    @abc.abstractmethod
    def projected_square(self, owner: "Owner", reduced: Tensor, steps: int) -> Tensor:
        """:meth:`square_norm` after the first step; float64, also on an owner of no matrix."""

    def squares(self, owner: "Owner", reduced: Tensor, steps: int) -> list[Tensor]:
        """:meth:`square_norm` of each matrix: (B,) for each of ``owner.pieces``. It is called after that method."""
        if steps == 0:
            sketches = ((piece.Y[..., : self.rank], piece.Z[..., : self.rank]) for piece in owner.pieces(reduced))
            return [sum(sketch.double().square().sum((-2, -1)) for sketch in pair) / 2 for pair in sketches]
        return self.projected_squares(owner, reduced)

    @abc.abstractmethod
    def projected_squares(self, owner: "Owner", reduced: Tensor) -> list[Tensor]:
        """:meth:`squares` after the first step."""

    @abc.abstractmethod
    def update(self, owner: "Owner", reduced: Tensor, working: Tensor, clip: float | Tensor, steps: int) -> None:
        """Work ``reduced`` into what :meth:`publish` and :meth:`keep` need, in its place.

        Args:
            reduced: this rank's segment of the mean sketches.
            working: the whole of the working copies that they were taken with.
            clip: factor on the gradient, <= 1.

        Raises:
            torch.linalg.LinAlgError: the state must be as it was; only of a rule that has :meth:`failed`.
        """

    @abc.abstractmethod
    def publish(self, owner: "Owner", updated: Tensor | None, working: Tensor, exchange: Exchange) -> None:
        """Write this rank's part of the working copies. Collective.

        Args:
            updated: what :meth:`update` has made of the sketches; None where it has raised.
        """

    def failed(self, layout: Layout, working: Tensor, steps: int) -> bool:
        """Whether the gathered working copies say that an owner's update has raised; the same on every rank."""
        return False

    def take_back(self, owner: "Owner", working: Tensor, exchange: Exchange) -> None:
        """After :meth:`failed`: :meth:`publish` once more, from the state before the step. Collective."""
        raise NotImplementedError(f"{self.name} has no update that fails")

    @abc.abstractmethod
    def keep(self, owner: "Owner", updated: Tensor) -> None:
        """The step is certain: let ``updated`` be the state."""

    def forget(self) -> None:
        """Drop what :meth:`square_norm` has kept for :meth:`update`."""

    def measures(self, owner: "Owner", updated: Tensor, clip: float | Tensor, count: int) -> Tensor | None:
        """:data:`ds_mofa.diagnostics.MEASURES` of this rank's among ``count`` matrices, before :meth:`keep`; float64,
        zero for the others'. None where there are none.
        """
        return None

    def parts(self, block: "Block") -> list[Part]:
        """The matrices of ``block``, so many at a time as are to be written together."""
        return [Part(block, 0, len(block.members))]

    def written(self, part: Part, working: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """left (B, m, r), right (B, n, r) and coefficients (B, r) of the update of W, on every rank; the coefficients
        of a matrix that stays are all zero.
        """
        return part.views(working)

    @abc.abstractmethod
    def lr_factor(self, m: int, n: int) -> float:
        """What lr is multiplied by for a linear map of n inputs and m outputs."""

    def prepare(self, layout: Layout, working: Tensor, steps: int) -> None:
        """Make the working copies what the next backward sketches with: after each write, a start, or a load."""
        if steps == 0:
            for index in range(len(layout.owners)):
                generator = self.generator(index, steps)
                for view in layout.views(working, index)[:2]:
                    self.draw(view[..., : self.rank], generator)

    @abc.abstractmethod
    def restore(self, state_layout: Layout, state: Tensor, layout: Layout, working: Tensor, steps: int) -> None:
        """The working copies from the whole of a loaded state, on every rank; :meth:`prepare` comes after it."""

    # ------------------------------------------------------------------ seeded test matrices

    def generator(self, index: int, steps: int) -> torch.Generator:
        """Of one matrix and step: the same on every rank, whatever the world size."""
        return torch.Generator().manual_seed(rounding_key(Rounding(False, self.seed, steps), index))

    def draw(self, view: Tensor, generator: torch.Generator) -> None:
        """Gaussian of variance 1 / r, so that |G Omega| ~ |G|."""
        drawn = torch.randn(view.shape, generator=generator, dtype=torch.float32, device="cpu")
        view.copy_(drawn / math.sqrt(self.rank))
