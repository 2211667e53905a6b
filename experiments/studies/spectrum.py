"""How low-rank the momentum is, over a training, and what a training loses that keeps only so many directions."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch

from experiments.comparison.plan import Plan
from experiments.comparison.training import train
from experiments.studies.energies import captured, directions_for, energies, noise_like
from experiments.studies.trajectory import Trajectory, role, stacked

__all__ = ["costs", "observe"]

SHARE = 0.8  # of the energy, which the paper finds in the top 32 directions


def observe(trajectory: Trajectory, betas: Sequence[float], tops: Sequence[int], every: int) -> dict[str, Any]:
    """Keep the exact momentum of each matrix beside a training that does not use it.

    Args:
        betas: decays of the momenta.
        tops: numbers of leading directions.
        every: steps between two looks.

    Returns:
        A JSON object: ``tops``; ``matrices``, each with ``name``, ``shape``, ``role`` and ``noise``, the shares of
        white noise of this shape; ``betas``, by beta the looks, each with its ``step`` and, in the order of
        ``matrices``, the shares of |M|^2 in the top directions (``share``) and how many directions hold 80 %
        (``directions``); ``dev``, the trainer's last evaluation.
    """
    momenta: dict[float, dict[tuple[str, ...], torch.Tensor]] = {beta: {} for beta in betas}
    looks: dict[float, list[dict[str, Any]]] = {beta: [] for beta in betas}
    matrices: list[dict[str, Any]] = []
    for step, gradients in enumerate(trajectory, start=1):
        batches = stacked(gradients)
        if step == 1:
            for names, G in batches.items():
                noise = captured(energies(noise_like(G)), tops)
                matrices += [
                    {"name": name, "shape": list(G.shape[1:]), "role": role(name), "noise": _rounded(shares)}
                    for name, shares in zip(names, noise)
                ]
        for beta in betas:
            for names, G in batches.items():
                M = momenta[beta].get(names)
                momenta[beta][names] = (1 - beta) * G if M is None else beta * M + (1 - beta) * G
            if step % every == 0:
                looks[beta].append({"step": step, **_look(momenta[beta], tops)})
    return {
        "tops": list(tops),
        "matrices": matrices,
        "betas": {str(beta): looks[beta] for beta in betas},
        "dev": trajectory.evaluate(),
    }


def _look(momenta: dict[tuple[str, ...], torch.Tensor], tops: Sequence[int]) -> dict[str, Any]:
    spreads = [energies(M) for M in momenta.values()]
    return {
        "share": [_rounded(shares) for spread in spreads for shares in captured(spread, tops)],
        "directions": [count for spread in spreads for count in directions_for(spread, SHARE).tolist()],
    }


def costs(plan: Plan, device: str, observed: dict[str, Any], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train by every setting of the plan but the trainer's.

    Returns:
        For each label and rank, the final loss on "dev" by learning rate, the mean over seeds (None: diverged), the
        ``best`` of them, and ``captured``, the mean share of the energy that this rank would have held of the exact
        momentum of the trainer (1 without a rank).
    """
    points: dict[tuple[str, int | None], dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    betas = {}
    for run in plan.runs:
        if run.setting.label == plan.labels[0]:
            continue
        row = train(run, plan.task, device)
        loss = None if row["diverged_at"] is not None else row["evaluations"][-1]["loss"]
        options = run.setting.options
        point = run.setting.label, options.get("rank")
        points[point][f"{options['lr']:g}"].append(loss)
        betas[point] = options.get("beta", 0.85)
        say(f"{run}: dev loss {loss if loss is None else round(loss, 4)}")
    return [
        {
            "label": label,
            "rank": rank,
            "captured": round(1.0 if rank is None else _mean_share(observed, betas[label, rank], rank), 4),
            "loss": (means := {lr: None if None in losses else fmean(losses) for lr, losses in by_rate.items()}),
            "best": min((lr for lr in means if means[lr] is not None), key=means.get, default=None),
        }
        for (label, rank), by_rate in points.items()
    ]


def _mean_share(observed: dict[str, Any], beta: float, rank: int) -> float:
    k = observed["tops"].index(rank)
    looks = observed["betas"][str(beta)]
    return fmean(fmean(share[k] for share in look["share"]) for look in looks)


def _rounded(shares: torch.Tensor) -> list[float]:
    return [round(share, 4) for share in shares.tolist()]
