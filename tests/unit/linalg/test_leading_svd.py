"""The leading singular triplets: as the library finds them, and as a GPU does, with the PyTorch twin of its kernel."""

import pytest
import torch

from ds_mofa.kernels import svd
from ds_mofa.linalg import factors
from ds_mofa.linalg.factors import leading_svd

ROWS, COLUMNS, RANK, B = 24, 20, 8, 3


def _core(kind):
    generator = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(B, size, COLUMNS, generator=generator)).Q for size in (ROWS, COLUMNS))
    spectrum = {
        "generic": torch.linspace(1, 0.1, COLUMNS),
        "far apart": torch.logspace(0, -8, COLUMNS),
        "of few directions": torch.cat([torch.tensor([1.0, 0.5, 0.2]), torch.zeros(COLUMNS - 3)]),
        "alike": torch.ones(COLUMNS),
        "zero": torch.zeros(COLUMNS),
    }[kind]
    return P * spectrum @ Q.mT


@pytest.fixture(params=["library", "kernel"])
def path(request, monkeypatch):
    if request.param == "kernel":
        monkeypatch.setattr(factors, "triton_serves", lambda tensor: True)
        monkeypatch.setattr(
            factors, "jacobi_svd", lambda K: svd._sorted_triplets(K, svd.rotations_by_blocks(K, svd.sweeps_twin))
        )


@pytest.mark.parametrize("scale", [1, 1e-20, 1e20])
@pytest.mark.parametrize("kind", ["generic", "far apart", "of few directions", "alike", "zero"])
def test_they_are_orthonormal_and_the_leading_ones(kind, scale, path):
    K = scale * _core(kind)
    P, sigma, Q = leading_svd(K, RANK)
    exact = torch.linalg.svdvals(K.double())
    size = exact[:, :1].clamp_min(1e-300)
    for side in (P, Q):
        assert (side.mT @ side - torch.eye(RANK)).abs().max() < 1e-12
    assert ((sigma - exact[:, :RANK]).abs() < 1e-5 * size).all()
    for image in (K.double() @ Q - P * sigma.unsqueeze(-2), K.double().mT @ P - Q * sigma.unsqueeze(-2)):
        assert (image.abs() < 1e-5 * size.unsqueeze(-1)).all()


def test_where_nothing_is_seen_fixed_columns_stand(path):
    """Noise there is another in every run, and the next gradient is projected on it."""
    K = _core("of few directions")
    P, sigma, Q = leading_svd(K, RANK)
    P_again, sigma_again, Q_again = leading_svd(K + 1e-9 * torch.randn(K.shape), RANK)
    assert (sigma[:, 3:] == 0).all() and (sigma_again[:, 3:] == 0).all()
    for one, other in ((P, P_again), (Q, Q_again)):
        assert (one - other).abs().max() < 1e-5


def test_as_the_rotations_leave_them_they_are_not_orthonormal(path, monkeypatch):
    """The control."""
    monkeypatch.setattr(factors, "_filled", lambda P, live: P.double())
    P, _, _ = leading_svd(_core("far apart"), RANK)
    assert (P.mT @ P - torch.eye(RANK)).abs().max() > 1e-9
