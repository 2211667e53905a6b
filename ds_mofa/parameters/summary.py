"""The table of a split, for the log: which shapes are matrices, what AdamW trains and why, and a warning if that is much."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

from ds_mofa.options import OptimizerOptions

__all__ = ["FEW", "Rest", "count", "largest", "remedy", "size", "summary_lines", "warning_lines"]

FEW = 0.6  # of the trained parameters: where less are matrices, AdamW's part decides the memory
_SHOWN = 3
_EIGHT_BIT = 2.03  # bytes of both moments of a parameter


class Rest(Protocol):
    """What AdamW trains, as :class:`ds_mofa.parameters.Leftover`."""

    @property
    def name(self) -> str: ...
    @property
    def numel(self) -> int: ...
    @property
    def reason(self) -> str: ...
    @property
    def itemsize(self) -> int: ...


def summary_lines(
    matrices: Sequence[tuple[int, ...]],
    leftovers: Sequence[Rest],
    options: OptimizerOptions,
    rates: Sequence[float],
    adamw_rates: Sequence[float],
) -> list[str]:
    """
    Args:
        matrices: their shapes, (E, m, n) of a stack of E.
        leftovers: what AdamW trains.
        options: of the optimizer.
        rates, adamw_rates: of the param groups of either, as they are now.
    """
    shapes: dict[tuple[int, ...], int] = defaultdict(int)
    reasons: dict[str, list[Rest]] = defaultdict(list)
    for shape in matrices:
        shapes[shape] += 1
    for leftover in leftovers:
        reasons[leftover.reason].append(leftover)
    stacks = sum(len(shape) > 2 for shape in matrices)
    in_all, numel = sum(math.prod(shape[:-2]) for shape in matrices), sum(map(math.prod, matrices))
    stacked = f" in {len(matrices)} tensors, {stacks} of them stacks," if stacks else ""
    lines = [
        f"{in_all} matrices{stacked} on {options.title} ({count(numel)} parameters), "
        f"{len(leftovers)} tensors on AdamW ({count(sum(rest.numel for rest in leftovers))} parameters)",
        f"  {_settings(options, rates, adamw_rates)}",
    ]
    lines += [f"  {options.title:7} {many:4d} x {shape}" for shape, many in shapes.items()]
    for reason, rests in reasons.items():
        shown = ", ".join(rest.name for rest in rests[:2]) + (", ..." if len(rests) > 2 else "")
        lines.append(
            f"  AdamW   {len(rests):4d} {reason}, {count(sum(rest.numel for rest in rests))} parameters: {shown}"
        )
    return lines


def _settings(options: OptimizerOptions, rates: Sequence[float], adamw_rates: Sequence[float]) -> str:
    words = [f"rank {options.rank}", f"lr {_rates(rates)}"]
    if adamw_rates:
        words.append(f"lr of AdamW {_rates(adamw_rates)}")
    words += [f"{name} {getattr(options, name)}" for name in ("explore", "balance") if hasattr(options, name)]
    words += ["products in fp8"] if options.fp8 else []
    return ", ".join(words)


def _rates(rates: Sequence[float]) -> str:
    low, high = min(rates), max(rates)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def warning_lines(share: float, leftovers: Sequence[Rest], options: OptimizerOptions) -> list[str]:
    """What is to be known where less than :data:`FEW` of the trained parameters are matrices; else nothing."""
    if share >= FEW:
        return []
    gradients = sum(rest.numel * rest.itemsize for rest in leftovers)
    eight_bit = options.adamw_states == "8bit"
    moments = int(sum(rest.numel * (_EIGHT_BIT if eight_bit else 2 * rest.itemsize) for rest in leftovers))
    lines = [
        f"ds_mofa: warning: {100 * share:.1f} % of the trained parameters are matrices. What AdamW trains has whole gradients, "
        f"{size(gradients)}, and moments, {size(moments)}" + ("" if eight_bit else ", more with fp32 masters")
    ]
    for name, many, numel, reason in largest(leftovers)[:_SHOWN]:
        tensors = f", {many} tensors" if many > 1 else ""
        lines.append(f"  {name}{tensors}, {count(numel)} parameters, {reason}: {remedy(name, reason)}")
    others = [] if eight_bit else ['"adamw_states": "8bit" keeps moments in 2.03 bytes a parameter']
    others += ["offload_optimizer keeps them on the host", "frozen parameters have none"]
    return [*lines, f"  {'; '.join(others)}"]


def largest(leftovers: Sequence[Rest]) -> list[tuple[str, int, int, str]]:
    """(name, tensors, parameters, reason), the most parameters first; those that differ in a number alone are one, *."""
    alike: dict[tuple[str, str], list[Rest]] = defaultdict(list)
    for rest in leftovers:
        alike[re.sub(r"(?<![^.])\d+(?=\.)", "*", rest.name), rest.reason].append(rest)
    found = [
        (name if len(rests) > 1 else rests[0].name, len(rests), sum(rest.numel for rest in rests), reason)
        for (name, reason), rests in alike.items()
    ]
    return sorted(found, key=lambda one: -one[2])


def remedy(name: str, reason: str) -> str:
    """What to do that it may be a matrix."""
    pattern = name.replace("*", "[0-9]+")
    if reason in ("embedding", "output head"):
        return f'"include": ["{pattern}"] makes it a matrix'
    if reason.startswith("2-D in"):
        return f'"include": ["{pattern}"] makes it a matrix, if it is the weight of a linear map'
    if reason.startswith("3-D in"):
        return f'"include": ["{pattern}"] makes it a stack of matrices, if it is the weights of linear maps'
    if reason.startswith("smaller"):
        return "lower the rank"
    if reason == "excluded by pattern":
        return "narrow exclude"
    return "it stays AdamW's"


def count(numel: int) -> str:
    """A number of parameters, such as 1.44M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if numel >= limit:
            return f"{numel / limit:.2f}{unit}"
    return str(numel)


def size(numbytes: int) -> str:
    """A number of bytes, such as 2.15 GB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if numbytes >= limit:
            return f"{numbytes / limit:.2f} {unit}"
    return f"{numbytes} bytes"
