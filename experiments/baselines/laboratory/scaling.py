"""What multiplies a direction: of a matrix, of its rows and columns, of its singular directions."""

from typing import Any

import torch
from torch import Tensor

from experiments.baselines.laboratory.batch import Batch, Terms

__all__ = ["balancing", "observe_rows", "row_scaled", "size_of", "softened", "trusted"]

_SMALLEST_ROW = 1e-2  # rms of a row against the mean row's, below which it is not scaled further


def observe_rows(batch: Batch, Y: Tensor, Z: Tensor, s: dict[str, Any]) -> None:
    if s["second_moment"] == "gradient":
        for key, side in (("rows", Y), ("columns", Z)):
            if s["second_moment_sides"] in ("both", key):
                _average_rows(batch, key, side.square().sum(-1), s)


def _average_rows(batch: Batch, key: str, squares: Tensor, s: dict[str, Any]) -> None:
    old = batch.get(key) if key in batch.states[0] else squares  # the first is no average with zero
    batch.put(key, s["beta2"] * old + (1 - s["beta2"]) * squares)


def row_scaled(batch: Batch, move: Terms, s: dict[str, Any]) -> Terms:
    """D with the second moments of its rows and columns taken out, and the norm that it had."""
    if s["second_moment"] == "none":
        return move
    U, c, V = move
    if s["second_moment"] == "update":
        # |row i of D|^2 = sum of c_j c_k u_ij u_ik (V^T V)_jk, and c_j^2 u_ij^2 where V is orthonormal
        for key, near, far in (("rows", U, V), ("columns", V, U)):
            if s["second_moment_sides"] in ("both", key):
                part = near * c.unsqueeze(-2)
                _average_rows(batch, key, (part @ (far.mT @ far) * part).sum(-1).clamp_min(0), s)
    before = _norm(move)
    for key in ("rows", "columns"):
        if key not in batch.states[0]:
            continue
        mean_square = batch.get(key)
        mean = mean_square.mean(-1, keepdim=True)
        relative = (mean_square / torch.where(mean > 0, mean, 1)).sqrt().clamp_min(_SMALLEST_ROW)
        factor = torch.where(mean > 0, relative ** -s["second_moment_power"], 1.0).unsqueeze(-1)
        U, V = (U * factor, V) if key == "rows" else (U, V * factor)
    after = _norm(Terms(U, c, V))
    return Terms(U, c * (before / torch.where(after > 0, after, 1)).unsqueeze(-1), V)


def _norm(terms: Terms) -> Tensor:
    """|sum_j c_j U_j V_j^T|, (B,)."""
    U, c, V = terms
    gram = (U.mT @ U) * (V.mT @ V)
    return (c.unsqueeze(-2) @ gram @ c.unsqueeze(-1)).squeeze((-2, -1)).clamp_min(0).sqrt()


def trusted(batches: list[Batch], power: float) -> list[Tensor]:
    """(rms of a matrix / geometric mean of all rms)^power, for each: LAMB's ratio, all updates being alike long."""
    sizes = [torch.stack([p.detach().double().square().mean().sqrt() for p in batch.params]) for batch in batches]
    return [factor.to(batch.G) for batch, factor in zip(batches, balancing(sizes, -power))]


def size_of(batch: Batch, s: dict[str, Any]) -> Tensor:
    """b_i, (B,)."""
    if s["balance_by"] == "gradient":
        return (batch.get("square") / (1 - s["beta2"] ** batch.t)).sqrt()
    return batch.get("sigma").norm(dim=-1)


def balancing(sizes: list[Tensor], power: float) -> list[Tensor]:
    """(geometric mean of all positive sizes / size)^power, for each; 1 where a size is zero."""
    joined = torch.cat(sizes)
    moving = joined > 0
    logs = torch.where(moving, joined, 1).log()
    mean = logs.sum() / moving.sum().clamp_min(1)
    factors = torch.where(moving, (power * (mean - logs)).exp(), 1)
    return list(factors.split([len(size) for size in sizes]))


def softened(sigma: Tensor, live: Tensor, power: float) -> Tensor:
    """live sigma^power, scaled to the norm of ``live``; (B, k)."""
    if power == 0:
        return live
    largest = sigma[..., :1]
    relative = torch.where(live > 0, sigma / torch.where(largest > 0, largest, 1), 1)
    soft = live * relative**power
    norm = soft.norm(dim=-1, keepdim=True)
    return soft * (live.norm(dim=-1, keepdim=True) / torch.where(norm > 0, norm, 1))
