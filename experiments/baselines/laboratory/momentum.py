"""The momentum's factors and the direction, from sketches of the gradient alone."""

from typing import Any

import torch
from torch import Tensor

from ds_mofa.linalg.factors import Factors, live_directions
from ds_mofa.linalg.orthonormal import Basis, Side, complements
from experiments.baselines.laboratory.batch import Batch, Terms, keep_factors, masked_factors
from experiments.baselines.laboratory.exploring import explored
from experiments.baselines.laboratory.probes import estimated, probed
from experiments.baselines.laboratory.scaling import observe_rows, softened
from experiments.baselines.laboratory.settings import decay_of, directions_of
from experiments.baselines.laboratory.svds import SVDs, with_svds

__all__ = ["by_sketches"]

_SPECTRUM_DECAY = 0.9


def by_sketches(batches: list[Batch], s: dict[str, Any]) -> list[Terms]:
    old, wide, sides = [], [], []
    for batch in batches:
        U, sigma, V = (batch.get(key) for key in ("U", "sigma", "V"))
        if s["momentum_reset"] and (batch.t - 1) % s["momentum_reset"] == 0:
            sigma = torch.zeros_like(sigma)
        old.append(Factors(U, sigma, V))
        Y, Z = batch.G @ V, batch.G.mT @ U
        H, J, W = probed(batch, old[-1], s)
        wide.append((Y, Z, H, J, W))
        sides += [Side(U, torch.cat([Y, H], dim=-1)), Side(V, torch.cat([Z, J], dim=-1))]
    bases = complements(sides)
    works = []
    for batch, factors, sketches, left, right in zip(batches, old, wide, bases[::2], bases[1::2]):
        observe_rows(batch, sketches[0], sketches[1], s)
        works.append(_turned(batch, factors, sketches, left, right, s))
    return with_svds(works)


def _turned(
    batch: Batch, old: Factors, sketches: tuple[Tensor, ...], left: Basis, right: Basis, s: dict[str, Any]
) -> SVDs:
    """Move the factors of ``batch``; the terms of its direction. Asks for SVDs."""
    (U, sigma, V), (Y, _, H, J, W) = old, sketches
    c, beta = sigma.shape[-1], decay_of(s, batch.t)
    gamma = 1 - beta
    T = _core(U, Y, left, right, c)
    if H.shape[-1]:
        missed = estimated(H, J, W, left.R[..., c:], right.R[..., c:], s)
        T[..., c:, c:] += s["probe_weight"] * missed
    M = torch.zeros_like(T)
    M[..., :c, :c] = torch.diag_embed(sigma)
    K = beta * M + gamma * T
    wanted = c
    if s["shrink"] or (s["update_rank"] > 1 and not s["nesterov"]):
        wanted = min(K.shape[-2:])
    P, spectrum, Q = yield K, wanted
    still = (spectrum[..., :1] == 0).unsqueeze(-1)  # any orthonormal P and Q diagonalise a zero core
    new = Factors(
        torch.where(still, U, left.turned(P[..., :c])),
        spectrum[..., :c],
        torch.where(still, V, right.turned(Q[..., :c])),
    )
    whole = new
    if s["shrink"] and wanted > c:
        new = new._replace(sigma=(new.sigma - s["shrink"] * spectrum[..., c : c + 1]).clamp_min(0))
    ranks = None
    if s["rank_budget"]:
        ranks = batch.get("rank")
        old_spectrum = batch.get("spectrum")
        batch.put("spectrum", _SPECTRUM_DECAY * old_spectrum + (1 - _SPECTRUM_DECAY) * new.sigma)
        new = masked_factors(new, ranks)
    keep_factors(batch, new)

    count = directions_of(s, batch.shape)
    if s["nesterov"]:
        kept = P[..., :c] * new.sigma.unsqueeze(-2) @ Q[..., :c].mT
        P, spectrum, Q = yield beta * kept.to(T.dtype) + gamma * T, min(count, *K.shape[-2:])
    if s["nesterov"] or count > c:
        chosen = P[..., :count], spectrum[..., :count], Q[..., :count]
        move = Terms(left.turned(chosen[0]), chosen[1], right.turned(chosen[2]))
        live = live_directions(move.coefficients)
        if ranks is not None:
            live = live * (torch.arange(live.shape[-1], device=live.device) < ranks.unsqueeze(-1))
    else:
        move = Terms(*(new if ranks is not None else whole))
        live = live_directions(move.coefficients)
        if count < c and ranks is None:  # oversampled
            move, live = Terms(*(part[..., :count] for part in move)), live[..., :count]
    move = Terms(move.U, softened(move.coefficients, live, s["soft"]), move.V)
    return (yield from explored(batch, old, move, s))


def _core(U: Tensor, Y: Tensor, left: Basis, right: Basis, c: int) -> Tensor:
    """The tangent projection of G in the coordinates of the two bases, (B, c + k_U, c + k_V)."""
    A = (U.double().mT @ Y.double()).to(Y.dtype)
    R_U, R_V = left.R[..., :c].to(Y.dtype), right.R[..., :c].to(Y.dtype)
    corner = A.new_zeros(len(A), R_U.shape[-2], R_V.shape[-2])
    return torch.cat([torch.cat([A, R_V.mT], dim=-1), torch.cat([R_U, corner], dim=-1)], dim=-2)
