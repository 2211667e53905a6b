"""Directions that nobody chose, added to an update; without momentum, but for those that are held."""

import math
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from ds_mofa.linalg.factors import Factors, live_directions
from ds_mofa.linalg.orthonormal import Side, complements
from experiments.baselines.laboratory.batch import Batch, Terms
from experiments.baselines.laboratory.complement import beside, orthonormal_beside
from experiments.baselines.laboratory.svds import SVDs

__all__ = ["explored"]


def explored(batch: Batch, old: Factors, move: Terms, s: dict[str, Any]) -> SVDs:
    if not s["explore"]:
        return move
    G, terms = batch.G, [move]
    for side, (near, far) in enumerate([(old.U, old.V), (old.V, old.U)][: 1 + (s["explore_sides"] == "both")]):
        E = _test_columns(batch, far, side, s)
        H = beside(near, (G.mT if side else G) @ (E if s["explore_by"] == "gaussian" else beside(far, E)))
        P, coefficients, Q = yield from _polar(_held(batch, f"held {side}", H, s), s["explore_scale"])
        outer = (E.double() @ Q).to(E.dtype)
        terms.append(Terms(outer, coefficients, P) if side else Terms(P, coefficients, outer))
    return Terms(*(torch.cat(parts, dim=-1) for parts in zip(*terms)))


def _held(batch: Batch, key: str, H: Tensor, s: dict[str, Any]) -> Tensor:
    """The average of H since its directions were drawn, with the momentum's decay."""
    hold = s["explore_hold"]
    if hold == 1:
        return H
    old = torch.zeros_like(H) if (batch.t - 1) % hold == 0 or key not in batch.states[0] else batch.get(key)
    new = s["beta"] * old + (1 - s["beta"]) * H
    batch.put(key, new)
    return new


def _polar(H: Tensor, scale: float) -> Generator[tuple[Tensor, int], tuple[Tensor, Tensor, Tensor], Terms]:
    """P, c, Q with scale polar(H) = P diag(c) Q^T."""
    [basis] = complements([Side(H[..., :0], H)])
    P, sigma, Q = yield basis.R.to(H.dtype), min(H.shape[-1], *basis.R.shape[-2:])
    return Terms(basis.turned(P), scale * live_directions(sigma), Q)


def _test_columns(batch: Batch, V: Tensor, stream: int, s: dict[str, Any]) -> Tensor:
    """E (stream 0) or F: k columns to explore along, (B, n or m, k)."""
    k, seed, rows = s["explore"], s["seed"] + 2, V.shape[-2]
    if s["explore_by"] == "coordinates":
        chosen = batch.gaussian(1, seed, stream, s["explore_hold"]).squeeze(-1).argsort(-1)[:, :k]
        return torch.nn.functional.one_hot(chosen, rows).mT.to(batch.G)
    draw = batch.gaussian(k, seed, stream, s["explore_hold"])
    return draw.sign() / math.sqrt(rows) if s["explore_by"] == "signs" else orthonormal_beside(V, draw)
