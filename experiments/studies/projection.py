"""What a projection of the gradient loses per step, and what the momentum that is made of projections then lacks."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from experiments.studies.energies import captured, energies
from experiments.studies.projections import KINDS, Projection, Tangent, first_factors
from experiments.studies.trajectory import Gradients, role, stacked

__all__ = ["Ledger", "measure"]


class Ledger:
    """Values by step and matrix, and their means."""

    def __init__(self):
        self._values: dict[int, dict[str, float]] = defaultdict(dict)

    def add(self, step: int, names: Sequence[str], values: Tensor) -> None:
        self._values[step].update(zip(names, values.tolist()))

    def summary(self, window: int = 1) -> dict[str, Any]:
        """``mean`` over all steps and matrices, ``late`` over the second half of the steps; ``by_role``; ``series``,
        the mean over the matrices, and over ``window`` steps, up to each step.
        """
        steps = sorted(self._values)
        means = [fmean(self._values[step].values()) for step in steps]
        windows = [(steps[i : i + window][-1], means[i : i + window]) for i in range(0, len(steps), window)]
        by_role = defaultdict(list)
        for step in steps:
            for name, value in self._values[step].items():
                by_role[role(name)].append(value)
        return {
            "mean": _rounded(fmean(means)),
            "late": _rounded(fmean(means[len(means) // 2 :])),
            "by_role": {name: _rounded(fmean(values)) for name, values in by_role.items()},
            "series": [[step, _rounded(fmean(values))] for step, values in windows],
        }


def measure(sequence: Iterable[Gradients], ranks: Sequence[int], beta: float, every: int) -> dict[str, Any]:
    """Show one sequence of gradients to every kind of projection at every rank.

    Args:
        sequence: gradients by name, step after step.
        ranks: of the momentum; none larger than a matrix's smaller side.
        beta: decay of the momentum, which starts as (1 - beta) G at the first step.
        every: steps between two looks at the momentum.

    Returns:
        A JSON object: ``shapes``, and by rank ``residual``, |G - P(G)| / |G| of each kind in the subspaces of its own
        momentum before the step; ``lowest``, the share of steps and matrices where the tangent's is below all others';
        ``same``, the residual in the subspaces of the tangent's momentum; ``excess``, the most by which, of all steps
        and matrices, the tangent's exceeds another's there (Theorem 4.3: never above 0, but for rounding);
        ``momentum``, |M_exact - M| / |M_exact|, "best" being that of the best rank-r approximation; ``random``, the
        residual expected of the tangent projection in random subspaces.
    """
    exact: dict[tuple[str, ...], Tensor] = {}
    ways: dict[tuple[tuple[str, ...], int], dict[str, Projection]] = {}
    records: dict[int, dict[str, dict[str, Ledger]]] = {
        r: {what: defaultdict(Ledger) for what in ("residual", "same", "momentum")} for r in ranks
    }
    excess = dict.fromkeys(ranks, -math.inf)
    lowest = Counter()
    seen = 0
    for step, gradients in enumerate(sequence, start=1):
        for names, G in stacked(gradients).items():
            if step == 1:
                exact[names] = (1 - beta) * G
                start = first_factors(G, max(ranks), beta)
                for r in ranks:
                    cut = type(start)(start.U[..., :r], start.sigma[..., :r], start.V[..., :r])
                    ways[names, r] = {kind: make(cut) for kind, make in KINDS.items()}
                continue
            exact[names] = beta * exact[names] + (1 - beta) * G
            seen += len(names)
            looks = step % every == 0
            shares = energies(exact[names]) if looks else None
            for r in ranks:
                record = records[r]
                same = _same_subspaces(ways[names, r]["tangent"], G)
                for kind, values in same.items():
                    record["same"][kind].add(step, names, values)
                    if kind != "tangent":
                        excess[r] = max(excess[r], (same["tangent"] - values).max().item())
                own = {kind: _relative(G - way.projected(G), G) for kind, way in ways[names, r].items()}
                others = torch.stack([values for kind, values in own.items() if kind != "tangent"])
                lowest[r] += (own["tangent"] < others.amin(0)).sum().item()
                for kind, way in ways[names, r].items():
                    record["residual"][kind].add(step, names, own[kind])
                    way.move(G, beta)
                    if looks:
                        missing = _relative(exact[names] - way.dense(), exact[names])
                        record["momentum"][kind].add(step, names, missing)
                if looks:
                    best = (1 - captured(shares, [r])[:, 0]).clamp_min(0).sqrt()
                    record["momentum"]["best"].add(step, names, best)
    return {
        "shapes": {f"{m} x {n}": len(names) for names, (_, m, n) in ((k, M.shape) for k, M in exact.items())},
        "ranks": {
            str(r): {
                **{
                    what: {kind: ledger.summary(1 if what == "momentum" else every) for kind, ledger in found.items()}
                    for what, found in records[r].items()
                },
                "excess": excess[r],
                "lowest": _rounded(lowest[r] / seen),
                "random": _rounded(fmean(_random(r, M) for M in exact.values() for _ in range(len(M)))),
            }
            for r in ranks
        },
    }


def _same_subspaces(tangent: Tangent, G: Tensor) -> dict[str, Tensor]:
    parts = tangent.parts(G)
    left, right = parts["inside"] + parts["left"], parts["inside"] + parts["right"]
    projected = {"tangent": left + parts["right"], "left": left, "right": right, "two-sided": parts["inside"]}
    return {kind: _relative(G - P, G) for kind, P in projected.items()}


def _relative(difference: Tensor, whole: Tensor) -> Tensor:
    """Ratio of the Frobenius norms, (B,); 0 where there is nothing."""
    norms = torch.linalg.matrix_norm(whole)
    return torch.linalg.matrix_norm(difference) / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _random(r: int, M: Tensor) -> float:
    return math.sqrt((1 - r / M.shape[-2]) * (1 - r / M.shape[-1]))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
