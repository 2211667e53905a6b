"""Exploring on a GPU: the CPU's signs, the dense directions, and steps like the CPU's, at r + k no power of two."""

import copy

import pytest
import torch
from torch import nn

from ds_mofa import MoFaSGD
from ds_mofa.linalg.exploring import Look, directions
from ds_mofa.partition.layout import Layout
from ds_mofa.rules.exploration import with_signs
from ds_mofa.step.signs import SignColumns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda")
SHAPES = [(96, 40), (40, 96), (96, 40), (257, 33)]


def _working(device, dtype, world=1):
    layout = Layout([(shape, 0) for shape in SHAPES], 8 + 5, world)
    working = torch.zeros(layout.numel, dtype=dtype, device=device)
    columns = SignColumns(layout, 8, 7, 1e9, torch.device(device))
    columns.draw(working, 123)
    return layout, working, columns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_columns_have_the_bits_of_a_cpu(dtype):
    _, expected, _ = _working("cpu", dtype)
    layout, working, columns = _working(GPU, dtype)
    assert torch.equal(working.cpu(), expected) and working.any()
    for block in layout.blocks:
        [part] = columns.parts(block)
        left, right, coefficients = with_signs(*part.views(working), 8, columns.of(part))
        assert torch.equal(left[..., 13:], part.views(working)[0][..., 8:])
        assert torch.equal(right[..., 8:13], part.views(working)[1][..., 8:])
        assert coefficients.shape[-1] == 8 + 2 * 5


def _looks(m, n, r, k, kind):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(3, size, r, device=GPU)).Q for size in (m, n))
    F, E = (torch.randn(3, size, k, device=GPU).sign() / size**0.5 for size in (m, n))
    G = torch.randn(3, m, n, device=GPU)
    if kind == "rank one":
        G = G[..., :1] @ G[..., :1, :]
    elif kind == "zero":
        G = torch.zeros_like(G)
    elif kind == "what the momentum sees":
        G = U @ G[..., :r, :] + G[..., :r] @ V.mT
    left, right = torch.cat([U, F], -1), torch.cat([V, E], -1)
    return [Look(U, G @ right, right), Look(V, G.mT @ left, left)], G


def _dense(G, U, V, E):
    G, U, V, E = (one.double() for one in (G, U, V, E))
    H = G @ E - G @ V @ (V.mT @ E)
    H = H - U @ (U.mT @ H)
    P, sigma, Qt = torch.linalg.svd(H, full_matrices=False)
    live = sigma > 1e-4 * (G @ E).norm(dim=(-2, -1)).unsqueeze(-1)
    return (P * live.unsqueeze(-2)) @ Qt


@pytest.mark.parametrize("kind", ["generic", "rank one", "zero", "what the momentum sees"])
@pytest.mark.parametrize(
    ("m", "n", "r", "k"),
    [
        (300, 200, 16, 8), (200, 300, 8, 1), (130, 70, 5, 3), (600, 500, 32, 8), (600, 500, 8, 96), (12, 50, 8, 8),
        (8, 40, 8, 4),
    ],
)  # fmt: skip
def test_the_directions_are_the_dense_ones(m, n, r, k, kind):
    looks, G = _looks(m, n, r, k, kind)
    found = list(directions(looks))
    (left, right), (U, V) = (look.test for look in reversed(looks)), (look.U for look in looks)
    for got, exact, side in zip(found, (_dense(G, U, V, right[..., r:]), _dense(G.mT, V, U, left[..., r:])), (U, V)):
        assert torch.isfinite(got).all()
        assert (got - exact).norm() <= 2e-3 * exact.norm()
        assert (side.double().mT @ got).abs().max() < 1e-5


def test_nothing_of_it_waits_for_the_device():
    looks, _ = _looks(300, 200, 16, 8, "generic")
    layout, working, columns = _working(GPU, torch.bfloat16)

    def all_of_it():
        list(directions(looks))
        columns.draw(working, 124)
        for block in layout.blocks:
            for part in columns.parts(block):
                with_signs(*part.views(working), 8, columns.of(part))

    all_of_it()  # compiles, and caches what is kept for good
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_of_it()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _trained(device, dtype, steps, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 64)).to(dtype)
    x = torch.randn(512, 128)
    y = torch.tanh(x @ torch.randn(128, 64) / 128**0.5)
    model, x, y = copy.deepcopy(model).to(device), x.to(device, dtype), y.to(device, dtype)
    optimizer = MoFaSGD(model, lr=2e-3, **options)
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model, losses


@pytest.mark.parametrize(("r", "k"), [(16, 8), (5, 3), (8, 32)])
def test_steps_are_those_of_a_cpu(r, k):
    """fp32; three steps, of which the second is the first to explore."""
    here, _ = _trained(GPU, torch.float32, 3, rank=r, explore=k, balance=0.5)
    there, _ = _trained("cpu", torch.float32, 3, rank=r, explore=k, balance=0.5)
    start, _ = _trained("cpu", torch.float32, 0, rank=r, explore=k)
    for one, other, before in zip(here.parameters(), there.parameters(), start.parameters()):
        if one.dim() == 2:
            moved = (other - before).norm()
            assert moved > 0 and (one.cpu() - other).norm() < 5e-3 * moved


@pytest.mark.parametrize(("r", "k"), [(16, 8), (8, 32)])
def test_a_bf16_model_learns_with_it_through_every_kernel(r, k):
    """Sketches of r + k columns by the queue, a write of r + 2 k with stochastic rounding."""
    _, losses = _trained(GPU, torch.bfloat16, 80, rank=r, explore=k, explore_scale=1.0)
    _, without = _trained(GPU, torch.bfloat16, 80, rank=r)
    assert losses[-1] < 0.5 * losses[0] and losses[-1] < without[-1]
