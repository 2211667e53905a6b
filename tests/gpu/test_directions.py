"""Explored directions that are hard to tell, on a GPU: those of a CPU, which unit/linalg holds against dense float64."""

import pytest
import torch

from ds_mofa.linalg.exploring import Look, directions
from ds_mofa.step.step import full_fp32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

M, N, R, B = 600, 500, 32, 3


def _look(kind: str, k: int, copies: torch.dtype) -> Look:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(B, *shape, generator=generator, dtype=torch.float64)

    U, V = (torch.linalg.qr(normal(size, R)).Q for size in (M, N))
    E = normal(N, k).sign() / N**0.5
    test = torch.cat([V, E], dim=-1).to(copies)
    G = normal(M, N)
    if kind == "few tokens":
        G = normal(M, 3) @ normal(3, N)
    elif kind == "nearly in span U":
        G = U @ normal(R, N) + 1e-3 * G
    Y = G @ test.double()
    if kind == "far apart":
        left, right = torch.linalg.qr(normal(M, k)).Q, torch.linalg.qr(normal(k, k)).Q
        Y[..., R:] = left * torch.logspace(0, -4, k, dtype=torch.float64) @ right.mT
        Y[..., :R] = 0
    return Look(U.float(), Y.float(), test)


@pytest.mark.parametrize("k", [3, 8, 32, 64, 128])  # column by column up to 64, by blocks beyond
@pytest.mark.parametrize("copies", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["generic", "few tokens", "nearly in span U", "far apart"])
def test_they_are_those_of_a_cpu(kind, copies, k):
    look = _look(kind, k, copies)
    [expected] = directions([look])
    with full_fp32():
        [found] = directions([Look(*(part.cuda() for part in look[:3]))])
    assert (found.cpu() - expected).norm() <= 1e-5 * expected.norm()
    assert (look.U.double().mT @ found.cpu()).abs().max() < 1e-9
