"""Explored directions where they are hard to tell: against dense float64 of the very numbers that came in."""

import pytest
import torch

from ds_mofa.kernels import svd
from ds_mofa.linalg import exploring
from ds_mofa.linalg.exploring import Look, directions, look_grams
from tests.reference import random_columns
from tests.unit.dense_reference import random_orthonormal, relative_error

M, N, R, K, B = 300, 200, 8, 8, 2
FLOOR = 64 * torch.finfo(torch.float32).eps


def _normal(*shape, generator):
    return torch.randn(B, *shape, generator=generator, dtype=torch.float64)


def _gradient(kind, U, V, generator):
    """G (B, m, n); float64."""
    G = _normal(M, N, generator=generator)
    if kind == "few tokens":
        return _normal(M, 3, generator=generator) @ _normal(3, N, generator=generator)
    if kind == "rows of zeros":
        G[:, 40:] = 0
    elif kind == "fewer rows than directions":
        G[:, 5:] = 0
    elif kind.startswith("nearly in span U"):
        G = U @ _normal(R, N, generator=generator) + float(kind.split()[-1]) * G
    elif kind.startswith("nearly in span V"):
        G = _normal(M, R, generator=generator) @ V.mT + float(kind.split()[-1]) * G
    return G


def _look(kind, copies, scale=1.0, k=K):
    """As it comes: U and Y in fp32, the working copies in theirs."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.stack([random_orthonormal(size, R, generator) for _ in range(B)]) for size in (M, N))
    E = torch.stack([E for _, E in random_columns([(M, N)] * B, k, 1)])
    if kind == "rows of zeros":  # of an embedding's tokens that have not come
        U = torch.nn.functional.pad(U[:, :40] @ torch.linalg.inv(torch.linalg.qr(U[:, :40]).R), (0, 0, 0, M - 40))
    if kind == "duplicates":
        E[..., 1], E[..., 5] = E[..., 0], E[..., 2]
    test = torch.cat([V, E], dim=-1).to(copies)
    Y = _gradient(kind, U, V, generator) @ test.double()
    if kind.startswith("far apart"):  # singular values of what the columns see
        left, right = (torch.linalg.qr(_normal(size, k, generator=generator)).Q for size in (M, k))
        Y[..., R:] = left * torch.logspace(0, float(kind.split()[-1]), k) @ right.mT
        Y[..., :R] = 0
    return Look(U.float(), (scale * Y).float(), test)


def _exact(look):
    """polar((1 - U U^T) (G E - G V C)), V C the projection of E onto the columns V, and its singular values by their size."""
    U, Y, test = (part.double() for part in look[:3])
    X = Y[..., R:] - Y[..., :R] @ torch.linalg.lstsq(test[..., :R], test[..., R:]).solution
    size = Y[..., R:].norm(dim=(-2, -1)) + X.norm(dim=(-2, -1))
    for _ in range(2):
        X = X - U @ torch.linalg.lstsq(U, X).solution
    P, s, Qt = torch.linalg.svd(X / size[:, None, None], full_matrices=False)
    return (P * (s > FLOOR).unsqueeze(-2)) @ Qt, s


KINDS = [
    "generic",
    "few tokens",
    "rows of zeros",
    "fewer rows than directions",
    "duplicates",
    "nearly in span U 1e-3",
    "nearly in span U 1e-5",
    "nearly in span V 1e-3",
    "nearly in span V 1e-5",
    "far apart -3",
    "far apart -4.7",
]


@pytest.mark.parametrize("scale", [1, 1e-20, 1e20])
@pytest.mark.parametrize("copies", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_dense_ones_to_rounding(kind, copies, scale):
    look = _look(kind, copies, scale)
    [found] = directions([look])
    expected, s = _exact(look)
    assert not ((s > FLOOR / 2) & (s < FLOOR)).any(), "the case asks for what rounding decides"
    assert relative_error(found, expected) < 2e-6
    lengths = torch.linalg.svdvals(found)
    assert torch.minimum(lengths, (lengths - 1).abs()).max() < 5e-6
    assert (look.U.double().mT @ found).abs().max() < 1e-9
    if kind == "rows of zeros":
        assert not found[:, 40:].any()


def test_the_library_s_and_the_kernel_s_rotations_lead_to_the_same(monkeypatch):
    """By blocks, with the PyTorch twin of the kernel; 40 columns, of lengths far apart."""
    look = _look("far apart -4.5", torch.bfloat16, k=40)
    [expected] = directions([look])
    monkeypatch.setattr(exploring, "triton_serves", lambda tensor: True)
    monkeypatch.setattr(exploring, "rotations", lambda R: svd.rotations_by_blocks(R, svd.sweeps_twin))
    [found] = directions([look])
    assert not torch.equal(found, expected)
    assert relative_error(found, expected) < 5e-6


def test_what_fp32_s_vectors_leave_beside_the_diagonal_is_let_in():
    """X (X^T X)^(-1/2) of singular values from 0.5 to 5e-5; the control takes the vectors as they are."""
    generator = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(_normal(size, K, generator=generator)).Q for size in (M, K))
    X = P * torch.logspace(0, -4, K, dtype=torch.float64) / 2 @ Q.mT
    H = X.mT @ X
    vectors = exploring._right_vectors(H)
    plain = (vectors * (vectors * (H @ vectors)).sum(-2, keepdim=True).rsqrt()) @ vectors.mT
    plain = 1.5 * plain - 0.5 * plain @ (plain.mT @ H @ plain)
    assert relative_error(X @ exploring._inverse_root(H, FLOOR), P @ Q.mT) < 1e-7
    assert relative_error(X @ plain, P @ Q.mT) > 1e-5


@pytest.mark.parametrize("kind", ["nearly in span U 1e-3", "nearly in span V 1e-3", "far apart -3"])
def test_of_gram_matrices_in_fp32_they_would_not_be(kind):
    """The control; and those that are handed in count."""
    look = _look(kind, torch.float32)
    given = look._replace(grams=tuple(gram.float().double() for gram in look_grams(look.U, look.Y)))
    [found], [exact] = directions([given]), directions([look])
    assert relative_error(found, _exact(look)[0]) > 1e-4
    [same] = directions([look._replace(grams=look_grams(look.U, look.Y))])
    assert torch.equal(same, exact)
