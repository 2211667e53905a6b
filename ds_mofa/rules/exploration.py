"""What exploring adds to a rule: the random columns of the working copies, the directions, and what is written."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_mofa.exploring import Look, directions, sign_words, signs
from ds_mofa.owner import Piece
from ds_mofa.partition import Block, Layout
from ds_mofa.subbatches import Part, split
from ds_mofa.weights import Rounding, rounding_key

__all__ = ["Exploration"]

_SIGNS = 32  # in a word


class Exploration:
    """k columns beside r in whatever is sent.

    In backward the working copies are left = [U F] and right = [V E]; the owners publish left = [U' A] and
    right = [V' B]; written is [U' A F] diag(c, s, s) [V' E B]^T, with E and F once more. They are in the gathered
    buffer no longer: 2 bits a sign are kept from one backward to the write, its counter's share and its own.

    A sign depends on the seed, the step, and its place among those of all matrices in their order: not on who owns
    what.

    Args:
        layout: of the buffers that are sent, of r + k columns.
        rank: r.
        seed: of the run.
        limit: bytes of temporaries, as ``update_bytes``.
        device: of the buffers.
    """

    def __init__(self, layout: Layout, rank: int, seed: int, limit: float, device: torch.device):
        self._rank, self._seed = rank, seed
        self._passes = split(layout.blocks, limit)
        self._words: dict[Part, Tensor] = {}
        self._parts: dict[Block, list[Part]] = {block: [] for block in layout.blocks}
        first = _first_words(layout, rank)
        counters = [[_counters(part, first, rank) for part in parts] for parts in self._passes]
        self._counters = [torch.cat(some).to(device) for some in counters]
        self._drawn = [torch.zeros_like(whole) for whole in self._counters]
        for parts, some, whole in zip(self._passes, counters, self._drawn):
            for part, own in zip(parts, whole.split([len(one) for one in some])):
                self._words[part] = own
                self._parts[part.block].append(part)

    def parts(self, block: Block) -> list[Part]:
        """The matrices of ``block``, so many at a time as are written together within ``limit``."""
        return self._parts[block]

    def held(self) -> list[Tensor]:
        """The bits and their counters."""
        return [*self._counters, *self._drawn]

    def draw(self, working: Tensor, steps: int) -> None:
        """New E and F into columns r, ... of the working copies."""
        key = rounding_key(Rounding(False, self._seed, steps), -1)  # no matrix' own
        for parts, counters, words in zip(self._passes, self._counters, self._drawn):
            words.copy_(sign_words(counters, key))
            for part, own in zip(parts, signs(words).split([_SIGNS * len(self._words[part]) for part in parts])):
                left, right, _ = part.views(working)
                self._place(own, left[..., self._rank :], right[..., self._rank :])

    def explore(self, pieces: Sequence[Piece], working: Tensor, length: Callable[[int, int], float]) -> None:
        """A and B over the k last columns of the sketches, and s, the ``length`` of an m x n matrix' directions, over the
        coefficients beside them.
        """
        r, looks = self._rank, []
        for piece in pieces:
            (U, V, *_), (left, right, _) = piece.state, piece.part.views(working)
            looks += [Look(U, piece.Y, right), Look(V, piece.Z, left)]
        sketches = itertools.chain.from_iterable((piece.Y, piece.Z) for piece in pieces)
        for sketch, found in zip(sketches, directions(looks), strict=True):
            sketch[..., r:] = found
        for piece in pieces:
            piece.core[..., r:] = length(*piece.part.block.shape)

    def stay(self, piece: Piece) -> None:
        """No direction, as :meth:`explore` would leave it: in the first step there is no momentum to look beside."""
        for sketch in (piece.Y, piece.Z, piece.core):
            sketch[..., self._rank :] = 0

    def written(self, part: Part, working: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[U' A F] (B, m, r + 2 k), [V' E B] (B, n, r + 2 k) and [c s s] (B, r + 2 k)."""
        r = self._rank
        left, right, coefficients = part.views(working)
        R, k = left.shape[-1], left.shape[-1] - r
        near, far = (view.new_empty(*view.shape[:-1], R + k) for view in (left, right))
        near[..., :R] = left
        far[..., :r] = right[..., :r]
        far[..., R:] = right[..., r:]
        self._place(signs(self._words[part]), near[..., R:], far[..., r:R])
        return near, far, torch.cat([coefficients, coefficients[..., r:]], dim=-1)

    @staticmethod
    def _place(drawn: Tensor, F: Tensor, E: Tensor) -> None:
        """F (B, m, k) and E (B, n, k) from all signs of a part."""
        at = 0
        for target in (F, E):
            B, rows, k = target.shape
            each = _SIGNS * _words(rows, k)
            own = drawn[at : at + B * each].view(B, each)[:, : rows * k].unflatten(-1, (rows, k))
            # A number would be taken in fp32, also beside a target of fp64.
            wide = torch.promote_types(target.dtype, torch.float32)
            length = torch.tensor(1 / math.sqrt(rows), dtype=wide, device="cpu")
            torch.mul(own, length, out=target)
            at += B * each


def _words(rows: int, k: int) -> int:
    return -(-rows * k // _SIGNS)


def _first_words(layout: Layout, rank: int) -> list[int]:
    """The number of each matrix' first word."""
    sizes = [0] * len(layout.owners)
    for block in layout.blocks:
        for index in block.members:
            sizes[index] = sum(_words(rows, block.rank - rank) for rows in block.shape)
    return [0, *itertools.accumulate(sizes)]


def _counters(part: Part, first: Sequence[int], rank: int) -> Tensor:
    """The numbers of the words of a part: of all its F, then of all its E; int32."""
    k, found = part.block.rank - rank, []
    starts = torch.tensor([first[index] for index in part.members], device="cpu")
    for rows in part.block.shape:
        count = _words(rows, k)
        found.append((starts.unsqueeze(-1) + torch.arange(count, device="cpu")).flatten())
        starts = starts + count
    return torch.cat(found).to(torch.int32)
