"""The order in which a network of tensors is contracted: two at a time, with the fewest multiplications.

A contraction of two tensors takes one multiplication for each value of all the indices that either has, so the cost of an
order is a sum of such products, and the best one is found exactly, by dynamic programming over sets of tensors. With the
2 d + 1 tensors of a layer (its input and d cores for each side) that is 3^(2 d + 1) / 2 steps: a thousand for d = 3, done
once for each shape.

Backward needs no search of its own: autograd goes through the same tree, and each contraction of c multiplications has
two adjoints of c. So all gradients together cost twice the forward, and the tree that is best for one is best for both.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Path", "best_path", "contract"]

Indices = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Path:
    """An order of contractions.

    Attributes:
        steps: each (left, right, indices of left, indices of right, indices of the result). Operands are numbered from 0,
            results go on from there.
        multiplications: of all steps.
    """

    steps: tuple[tuple[int, int, Indices, Indices, Indices], ...]
    multiplications: int


@functools.lru_cache(maxsize=4096)
def best_path(terms: tuple[Indices, ...], output: Indices, sizes: Indices) -> Path:
    """The cheapest order; of two as cheap, that with the smaller intermediates.

    Args:
        terms: the indices of each operand, in the order of its dimensions.
        output: those of the result. All others are summed.
        sizes: of index 0, 1, ...
    """
    count, everything = len(terms), (1 << len(terms)) - 1

    def open_indices(subset: int) -> frozenset[int]:
        """What the product of a set of operands still has: its indices that others or the output need."""
        inside = {index for k in range(count) if subset >> k & 1 for index in terms[k]}
        outside = {index for k in range(count) if not subset >> k & 1 for index in terms[k]} | set(output)
        return frozenset(inside & outside)

    kept = [open_indices(subset) for subset in range(everything + 1)]
    for k, term in enumerate(terms):
        kept[1 << k] = frozenset(term)
    volume = functools.lru_cache(None)(lambda indices: math.prod(sizes[index] for index in indices))
    # Of each set: multiplications, elements of its intermediates, and the half that holds its lowest operand.
    best = [(0, 0, 0)] * (everything + 1)
    for subset in range(1, everything + 1):
        lowest, rest = subset & -subset, subset & (subset - 1)
        if not rest:
            continue
        candidates, other = [], rest
        while other:
            half = subset ^ other
            cost = best[half][0] + best[other][0] + volume(kept[half] | kept[other])
            elements = best[half][1] + best[other][1] + volume(kept[subset])
            candidates.append((cost, elements, half))
            other = (other - 1) & rest
        best[subset] = min(candidates)
        assert best[subset][2] & lowest
    steps: list[tuple[int, int, Indices, Indices, Indices]] = []

    def add(subset: int) -> tuple[int, Indices]:
        """The number and the indices of a set's product, after the steps that it takes."""
        if not subset & (subset - 1):
            k = subset.bit_length() - 1
            return k, terms[k]
        half = best[subset][2]
        (left, of_left), (right, of_right) = add(half), add(subset ^ half)
        order = [i for i in dict.fromkeys((*of_left, *of_right)) if i in kept[subset]]
        result = output if subset == everything else tuple(order)
        steps.append((left, right, of_left, of_right, result))
        return count + len(steps) - 1, result

    add(everything)
    return Path(tuple(steps), best[everything][0])


def contract(path: Path, operands: Sequence[Tensor]) -> Tensor:
    """The result of a path of at least one step; differentiable in all operands."""
    values: list[Tensor | None] = list(operands)
    for left, right, of_left, of_right, result in path.steps:
        values.append(torch.einsum(values[left], of_left, values[right], of_right, result))
        values[left] = values[right] = None
    return values[-1]
