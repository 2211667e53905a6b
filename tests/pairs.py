"""Of all combinations of some axes, few in which every two values of every two axes still meet.

Most faults of a combination are faults of two of its values: what goes wrong at ZeRO-3 with bf16 goes wrong on two
ranks and on three. With axes of 4, 3, 2 and 2 values, 12 combinations of 48 hold every such pair.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = ["covering", "pairs", "pairs_in"]


def pairs(**axes: Iterable[Any]) -> list[dict[str, Any]]:
    """Some of the combinations of ``axes``, in their order: every two values of every two axes are together in one."""
    combinations = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    return [combinations[i] for i in covering(combinations)]


def covering(combinations: Sequence[dict[str, Any]]) -> list[int]:
    """Which of ``combinations`` hold every pair of values that any of them holds, by number; the same each time.

    Greedy: the one that adds most is taken next, the first of several. Values are told apart by their JSON.
    """
    held = [set(pairs_in(combination)) for combination in combinations]
    missing, taken = set().union(*held), set()
    while missing:
        best = max(range(len(held)), key=lambda i: (len(held[i] & missing), -i))
        taken.add(best)
        missing -= held[best]
    return sorted(taken)


def pairs_in(combination: dict[str, Any]) -> Iterator[tuple]:
    """Every two of its axes with their values; the one value where there is a single axis."""
    values = [(axis, json.dumps(value, sort_keys=True)) for axis, value in sorted(combination.items())]
    yield from itertools.combinations(values, min(2, len(values)))
