"""MLorc (arXiv 2506.01897): Adam whose two moments live as rank-r factors between the steps.

For the gradient G (seen wide, s x l, s <= l), in step t = 1, 2, ...:

    m~ = U_m diag(s_m) V_m^T      v~ = U_v diag(s_v) V_v^T          zero in the first step
    v~ <- v~ where v~ >= 0, the mean magnitude of its negative entries where v~ < 0
    m, v = Adam's moments of m~, v~ and the whole G
    W <- W - lr N,  N Adam's direction of m and v, before they are compressed
    (U_m, s_m, V_m) = RSVD_r(m)   (U_v, s_v, V_v) = RSVD_r(v)

RSVD (Halko, Martinsson, Tropp 2011) of A: Q = qr(A Omega) with Omega Gaussian, l x (r + p), then the SVD of Q^T A,
cut to r. Each power iteration takes Q to qr(A qr(A^T Q)). The paper has p = 0; that its published code makes one power
iteration (through ``torch.pca_lowrank``) is the default here. Omega is keyed by seed, step and matrix.

How the negative entries are mended is taken from the published code; the paper's formula as reported, ReLU(v~) plus the
magnitude of a mean, could also be read as adding that mean to the other entries.

Kept per m x n matrix: two sets of factors, 8 r (m + n + 1) bytes. During the step m, v and N are whole matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_mofa.options import check_integer
from experiments.baselines.adam import adam_direction, adam_moments, check_adam
from experiments.baselines.matrix_method import MatrixMethod
from experiments.baselines.projected_gradient import Gradient
from experiments.baselines.randomness import keyed_generator

__all__ = ["MLorc", "randomized_svd", "mended"]


class MLorc(MatrixMethod):
    """See :mod:`experiments.baselines.mlorc`.

    Args:
        params: param groups with ``lr`` and ``weight_decay``.
        rank: r.
        oversampling: p.
        power_iterations: of the randomized SVD.
        betas: of Adam's moments.
        eps: of Adam.
        seed: of the test matrices Omega.
    """

    def __init__(
        self,
        params,
        *,
        rank: int,
        oversampling: int = 0,
        power_iterations: int = 1,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
    ):
        check_integer("oversampling", oversampling, low=0, high=2**31)
        check_integer("power_iterations", power_iterations, low=0, high=100)
        check_adam(betas, eps)
        super().__init__(
            params,
            rank=rank,
            oversampling=oversampling,
            power_iterations=power_iterations,
            betas=tuple(betas),
            eps=eps,
            seed=seed,
        )

    def direction(self, G: Gradient, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor:
        t = state["step"]
        if t == 1:
            m = v = torch.zeros_like(G.value)
        else:
            m, v = (_product(*(state[moment + part] for part in _PARTS)) for moment in "mv")
        m, v = adam_moments(m, mended(v), G.value, group["betas"])
        generator = keyed_generator(group["seed"], t, index, G.value.device)
        for moment, value in (("m", m), ("v", v)):
            factors = randomized_svd(
                value, group["rank"], group["oversampling"], group["power_iterations"], generator=generator
            )
            state.update(zip((moment + part for part in _PARTS), factors))
        return adam_direction(m, v, t, group["betas"], group["eps"])


_PARTS = ("_U", "_sigma", "_V")


def _product(U: Tensor, sigma: Tensor, V: Tensor) -> Tensor:
    return U * sigma @ V.mT


def randomized_svd(
    A: Tensor, rank: int, oversampling: int, power_iterations: int, *, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """U (s, r), sigma (r), V (l, r), about the leading singular triplets of A (s, l); exact where A has rank <= r."""
    columns = min(rank + oversampling, *A.shape)
    omega = torch.randn(A.shape[1], columns, generator=generator, device=A.device, dtype=A.dtype)
    Q = torch.linalg.qr(A @ omega).Q
    for _ in range(power_iterations):
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.mT @ Q).Q).Q
    U, sigma, Vt = torch.linalg.svd(Q.mT @ A, full_matrices=False)
    return Q @ U[:, :rank], sigma[:rank].clone(), Vt[:rank].mT.contiguous()


def mended(v: Tensor) -> Tensor:
    """v with the mean magnitude of its negative entries in their place: a truncated SVD does not keep the sign."""
    negative = v < 0
    mean = -v.clamp_max(0).sum() / negative.sum().clamp_min(1)
    return torch.where(negative, mean, v)
