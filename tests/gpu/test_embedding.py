"""Sketches of an embedding on a GPU: the dense gradient's, and the same bits each time."""

import pytest
import torch

from ds_mofa.capture.sketch import Sketch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS, M, WIDTH, RANK = 8192, 32000, 256, 16


def _sketched(ids, dy):
    generator = torch.Generator("cuda").manual_seed(1)
    U, V = (torch.randn(rows, RANK, generator=generator, device="cuda").to(dy.dtype) for rows in (M, WIDTH))
    sketch = Sketch(torch.zeros(M, RANK, device="cuda"), torch.zeros(WIDTH, RANK, device="cuda"), U, V)
    sketch.add_rows(ids, dy)
    return sketch


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("most", [M, 40], ids=["many tokens", "few"])
def test_the_sketches_are_the_gradient_s_and_their_bits_the_same_each_time(most, dtype, tolerance):
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(most, (4, TOKENS // 4), generator=generator, device="cuda")
    dy = torch.randn(4, TOKENS // 4, WIDTH, generator=generator, device="cuda").to(dtype)
    first = _sketched(ids, dy)
    G = torch.zeros(M, WIDTH, dtype=torch.float64, device="cuda").index_add_(
        0, ids.flatten(), dy.flatten(0, 1).double()
    )
    for got, wanted in ((first.Y, G @ first.V.double()), (first.Z, G.mT @ first.U.double())):
        assert (got - wanted).norm() < tolerance * wanted.norm()
    for _ in range(5):
        again = _sketched(ids, dy)
        assert torch.equal(again.Y, first.Y) and torch.equal(again.Z, first.Z)
