"""Probes: what the gradient has beyond the tangent space, estimated from a few random columns."""

from typing import Any

import torch
from torch import Tensor

from ds_mofa.linalg.factors import Factors
from experiments.baselines.laboratory.batch import Batch
from experiments.baselines.laboratory.complement import beside, orthonormal_beside

__all__ = ["estimated", "observe_norm", "probed", "range_estimate"]


def observe_norm(batch: Batch, seen: Tensor, s: dict[str, Any]) -> None:
    """Take |G Omega|^2 / k into the average of |G|^2."""
    if s["balance_by"] == "gradient":
        batch.averaged("square", seen.square().sum((-2, -1)) / seen.shape[-1], s["beta2"])


def probed(batch: Batch, old: Factors, s: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """H (B, m, k), J and, for the rule "range", Psi^T H (B, 2 k + 1, k); all of G_perp. For "random" J is E."""
    G, (U, _, V), k = batch.G, old, s["probes"]
    if not k:
        return G[..., :0], G.mT[..., :0], None
    omega = batch.gaussian(k, s["seed"], 0)
    seen = G @ omega
    observe_norm(batch, seen, s)
    if s["probe_weight"] == 0:
        return G[..., :0], G.mT[..., :0], None
    if s["probe_rule"] == "random":
        E = orthonormal_beside(V, omega)
        return beside(U, G @ E), E, None
    psi = batch.gaussian(2 * k + 1, s["seed"], 1)
    # (1 - U U^T) (G Omega - Y V^T Omega), so that what was sketched is G Omega alone; likewise G^T Psi.
    H = beside(U, seen - (G @ V) @ (V.mT @ omega))
    J = beside(V, G.mT @ psi - (G.mT @ U) @ (U.mT @ psi))
    return H, J, psi.mT @ H


def estimated(H: Tensor, J: Tensor, W: Tensor | None, H_Q: Tensor, J_Q: Tensor, s: dict[str, Any]) -> Tensor:
    """N, (B, k_U, k_V): the estimate of G_perp between Q_U and Q_V, from H and J in their coordinates."""
    H_Q, J_Q = H_Q.to(H.dtype), J_Q.to(J.dtype)
    return H_Q @ J_Q.mT if W is None else range_estimate(H_Q, J_Q, W)


def range_estimate(H: Tensor, J: Tensor, W: Tensor) -> Tensor:
    """H W^+ J^T ~ G, from H = G Omega, J = G^T Psi and W = Psi^T G Omega; exact where G has rank <= columns of Omega.

    It is B (Psi^T B)^+ J^T with B = orth(H), and does not depend on which basis of span H stands in B's place.
    """
    # W^+ through its Gram matrix, in float64: no decomposition that would wait for the device.
    W = W.double()
    gram = W.mT @ W
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    size = torch.where(size > 0, size, 1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    L = torch.linalg.cholesky_ex(gram / size + 1e-10 * eye).L
    X = torch.cholesky_solve(W.mT @ J.double().mT / size, L)
    return (H.double() @ X).to(H.dtype)
