"""The block Jacobi SVD on a CPU: its driver with the PyTorch twin of the kernel."""

import pytest
import torch

from ds_mofa.kernels import svd


def _cores(kind, rows, columns):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(3, *shape, generator=generator)

    if kind == "rank one":
        return normal(rows, 1) @ normal(1, columns)
    K = normal(rows, columns)
    if kind == "zero":
        return torch.zeros_like(K)
    if kind == "graded":
        return K * torch.logspace(0, -6, columns)
    if kind == "graded upwards":
        return K * torch.logspace(-6, 0, columns)
    if kind == "tiny":
        return K * 1e-30
    if kind == "huge":
        return K * 1e30
    if kind == "core":  # as in ds_mofa.linalg.factors: sorted, nearly diagonal, and zero in the last quarter
        K = 0.05 * K
        K.diagonal(dim1=-2, dim2=-1).add_(torch.logspace(0, -3, min(rows, columns)))
        K[:, rows // 2 :, columns // 2 :] = 0
    elif kind == "one zero, one not":
        K[0] = 0
    elif kind == "equal":  # every singular value is the same
        K = torch.linalg.qr(K if rows >= columns else K.mT).Q
        K = K if rows >= columns else K.mT
    return K


KINDS = [
    "generic", "rank one", "zero", "graded", "graded upwards", "tiny", "huge", "core", "one zero, one not", "equal"
]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns"), [(6, 7), (32, 32), (50, 40), (40, 50), (64, 64), (128, 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_block_jacobi_agrees_with_the_library(kind, rows, columns):
    K = _cores(kind, rows, columns)
    scaled, sigma, Q = svd._sorted_triplets(K, svd.rotations_by_blocks(K, svd.sweeps_twin))
    _, expected, _ = svd.jacobi_svd_twin(K.double())
    norm = K.double().norm(dim=(-2, -1), keepdim=True).clamp_min(1e-300)
    products = K.double() @ Q.double()
    gram = (products / norm).mT @ (products / norm)
    assert ((sigma - expected) / norm[..., 0]).abs().max() < 5e-7
    assert ((products - scaled) / norm).abs().max() < 5e-7
    assert (gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))).abs().max() < 2e-7
    assert (Q.double().mT @ Q.double() - torch.eye(columns)).abs().max() < 2e-6
    assert (sigma[:, :-1] >= sigma[:, 1:]).all()


@pytest.mark.parametrize("blocks", [2, 4, 6, 16])
def test_in_a_tournament_all_meet_once(blocks):
    rounds = [svd.pairs(blocks, turn) for turn in range(blocks - 1)]
    assert all(sorted(sum(met, ())) == list(range(blocks)) for met in rounds)
    assert len({pair for met in rounds for pair in met}) == blocks * (blocks - 1) // 2
    assert all(low < high for met in rounds for low, high in met)


def test_a_round_rotates_rows_and_leaves_matrices_that_are_done():
    torch.manual_seed(0)
    rows = torch.randn(3, 64, 80) / 64
    before = rows.clone()
    worst = torch.tensor([[torch.inf, 1e-8, 0.5], [0.0] * 3])
    svd.rotate_twin(rows, worst, 0, 1, p=48, block=16, tolerance=1e-3, floor=1e-12)
    assert torch.equal(rows[1], before[1]) and worst[1, 1] == 0
    for k in (0, 2):
        assert not torch.equal(rows[k], before[k]) and worst[1, k] > 0
        torch.testing.assert_close(rows[k].T @ rows[k], before[k].T @ before[k])  # W is orthonormal


def test_a_matrix_costs_no_more_sweeps_than_it_needs():
    """Sorted and orthogonal columns: one sweep looks at them, and no later one does."""
    rows = torch.cat([torch.diag(torch.linspace(1, 0.1, 64)), torch.eye(64)], dim=-1).unsqueeze(0) / 8
    worst = torch.zeros(5, 1)
    worst[0] = torch.inf
    expected = rows.clone()
    svd.sweeps_twin(rows, worst, 64, 1e-3)
    assert torch.equal(rows, expected) and not worst[1:].any()

    rows = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(0)) / 64
    worst = torch.zeros(15, 1)
    worst[0] = torch.inf
    svd.sweeps_twin(rows, worst, 64, 1e-3)
    used = int((worst[1:] > 0).sum())
    assert 4 <= used <= 12 and worst[used] <= 1e-6 and not worst[used + 1 :].any()
