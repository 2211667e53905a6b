"""The direction from all of the gradient: what an idea could gain at most, not to be shipped."""

from typing import Any

import torch
from torch import Tensor

from ds_mofa.linalg.factors import Factors, live_directions
from experiments.baselines.laboratory.batch import Batch, Terms, keep_factors
from experiments.baselines.laboratory.scaling import softened
from experiments.baselines.laboratory.settings import decay_of, directions_of

__all__ = ["by_oracle"]


def by_oracle(batches: list[Batch], s: dict[str, Any]) -> list[Terms]:
    moves = []
    for batch in batches:
        beta = decay_of(s, batch.t)
        if s["oracle"] == "momentum":
            old = batch.get("M") if "M" in batch.states[0] else torch.zeros_like(batch.G)
        else:
            U, sigma, V = (batch.get(key) for key in ("U", "sigma", "V"))
            old = U * sigma.unsqueeze(-2) @ V.mT
        M = beta * old + (1 - beta) * batch.G
        count = directions_of(s, batch.shape)
        leading = _dense_leading(M, max(count, s["rank"]))
        if s["oracle"] == "momentum":
            batch.put("M", M)
            batch.put("sigma", leading.sigma[..., : s["rank"]])
        else:
            keep_factors(batch, Factors(*(part[..., : s["rank"]] for part in leading)))
        if s["nesterov"]:
            leading = _dense_leading(beta * M + (1 - beta) * batch.G, count)
        U, sigma, V = (part[..., :count] for part in leading)
        moves.append(Terms(U, softened(sigma, live_directions(sigma), s["soft"]), V))
    return moves


def _dense_leading(M: Tensor, r: int) -> Factors:
    """The r leading singular triplets of M (B, m, n), through the smaller Gram matrix."""
    given, M = M.dtype, M.double()
    tall = M.shape[-2] > M.shape[-1]
    X = M.mT if tall else M
    values, vectors = torch.linalg.eigh(X @ X.mT)
    near = vectors[..., -r:].flip(-1)
    sigma = values[..., -r:].flip(-1).clamp_min(0).sqrt()
    sigma = torch.where(sigma > 1e-6 * sigma[..., :1], sigma, 0)
    far = X.mT @ near / torch.where(sigma > 0, sigma, 1).unsqueeze(-2)
    U, V = (far, near) if tall else (near, far)
    return Factors(U.to(given), sigma.to(given), V.to(given))
