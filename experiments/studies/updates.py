"""How large AdamW's update is: for each weight, and along each direction of its matrix."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from experiments.baselines.adam import adam_direction, adam_moments
from experiments.studies.trajectory import Gradients, stacked

__all__ = ["measure"]


def measure(
    sequence: Iterable[Gradients], tops: Sequence[int], every: int, betas: Sequence[float] = (0.9, 0.999)
) -> dict[str, Any]:
    """Adam's direction N of a sequence of gradients, W <- W - lr N, at every ``every``-th step.

    Args:
        tops: which singular values of N to tell, 1 being the largest.

    Returns:
        A JSON object, means over the matrices and the looks, and by the matrix's shape: ``rms``, |N|_F / sqrt(m n);
        ``singular``, singular values over sqrt(max(m, n)), which is what all of them are where N is orthogonal and has
        an RMS of 1; None beyond min(m, n). ``series`` has the step, its mean ``rms`` and its mean ``singular``.
    """
    moments: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
    by_shape: dict[str, list[list[float | None]]] = defaultdict(list)
    series = []
    for step, gradients in enumerate(sequence, start=1):
        looked: list[list[float | None]] = []
        for names, G in stacked(gradients).items():
            m, v = moments.get(names, (torch.zeros_like(G), torch.zeros_like(G)))
            moments[names] = adam_moments(m, v, G, betas)
            if step % every:
                continue
            N = adam_direction(*moments[names], step, betas, eps=1e-8)
            sizes = _sizes(N, tops)
            looked += sizes
            by_shape["{} x {}".format(*N.shape[-2:])] += sizes
        if looked:
            series.append([step, *_means(looked)])
    everything = [row for rows in by_shape.values() for row in rows]
    return {
        "tops": list(tops),
        "all": _named(_means(everything)),
        "shapes": {shape: _named(_means(rows)) for shape, rows in by_shape.items()},
        "series": series,
    }


def _sizes(N: Tensor, tops: Sequence[int]) -> list[list[float | None]]:
    """Of each matrix its RMS and its singular values; N (B, m, n)."""
    *_, m, n = N.shape
    rms = torch.linalg.matrix_norm(N) / math.sqrt(m * n)
    values = torch.linalg.svdvals(N) / math.sqrt(max(m, n))
    return [
        [size, *(one[top - 1] if top <= len(one) else None for top in tops)]
        for size, one in zip(rms.tolist(), values.tolist())
    ]


def _means(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    columns = ([value for value in column if value is not None] for column in zip(*rows))
    return [float(f"{fmean(column):.4g}") if column else None for column in columns]


def _named(means: Sequence[float | None]) -> dict[str, Any]:
    return {"rms": means[0], "singular": means[1:]}
