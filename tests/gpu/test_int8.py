"""Matrices in eight bits on a GPU: the kernels against their twins, and a run against the same on the CPU."""

import pytest
import torch
from torch import nn

from ds_mofa import MoFaSGD
from ds_mofa.kernels.int8 import Int8Weight, widened
from ds_mofa.kernels.random_bits import Rounding
from ds_mofa.kernels.shard import Shard
from ds_mofa.weights.write import write_updates
from tests.autoencoding import losses_by_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def eighths(*shape):
    """Numbers whose products and sums are exact in fp32 and bf16, so that the order of a sum cannot matter."""
    return torch.randint(-4, 5, shape).float() / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(1, 32), (70, 96), (3, 40, 4128), (300, 14336)], ids=str)
def test_widening_gives_the_bits_of_its_twin(shape, dtype):
    torch.manual_seed(0)
    weight = Int8Weight.of(torch.randn(shape))
    weight.exponents.view(-1)[0] = 255  # no number
    wide = widened(weight.codes, weight.exponents, dtype)
    ours = widened(weight.codes.cuda(), weight.exponents.cuda(), dtype)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.cpu(), wide, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize(
    ("m", "n", "r", "first", "rows"),
    [
        (40, 32, 5, 0, 40),
        (70, 96, 8, 13, 41),
        (257, 1056, 72, 0, 257),
        (33, 160, 128, 32, 1),
        (600, 512, 248, 100, 500),
    ],
)
def test_the_write_gives_the_bits_of_its_twin(m, n, r, first, rows, size, dtype, stochastic):
    """The second of three matrices has no coefficients, and stays as it is."""
    torch.manual_seed(0)
    U, V = eighths(3, m, r).to(dtype), eighths(3, n, r).to(dtype)
    coefficients = (torch.rand(3, r) > 0.3).to(dtype)
    coefficients[:, 0] = 1
    coefficients[1] = 0
    start = Int8Weight.of(torch.randn(3, rows, n) * 0.02 * size)
    written = []
    for device in ("cpu", "cuda"):
        codes, exponents = start.codes.to(device, copy=True), start.exponents.to(device, copy=True)
        shards = [Shard(c.view(-1), first * n, exponents=e.view(-1)) for c, e in zip(codes, exponents)]
        write_updates(
            shards,
            U.to(device),
            V.to(device),
            coefficients.to(device),
            numbers=torch.tensor([3, 9, 4]),
            step_size=2.0**-12 * size,
            decay=0.75,
            rounding=Rounding(stochastic, seed=12345, step=7),
        )
        written.append((codes.cpu(), exponents.cpu()))
    for cpu, cuda, before in zip(*written, (start.codes, start.exponents)):
        assert torch.equal(cpu, cuda)
        assert torch.equal(cuda[1], before[1])
    assert not torch.equal(written[1][0][0], start.codes[0])


def test_what_is_no_number_says_so():
    weight = Int8Weight.of(torch.ones(70, 96))
    weight = Int8Weight(weight.codes.cuda(), weight.exponents.cuda(), torch.bfloat16)
    U, V = torch.ones(1, 70, 8, device="cuda"), torch.ones(1, 96, 8, device="cuda")
    U[0, 3] = float("nan")
    shard = Shard(weight.codes.view(-1), exponents=weight.exponents.view(-1))
    how = {"numbers": torch.arange(1), "step_size": 0.1, "decay": 1.0, "rounding": Rounding(True)}
    write_updates([shard], U, V, torch.ones(1, 8, device="cuda"), **how)
    wide = weight.widened()
    assert wide[3].isnan().all() and wide[:3].isfinite().all() and wide[4:].isfinite().all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_run_is_that_of_the_cpu(compiled):
    """Losses to the noise of a rounding here and there, and no weight is ever whole in sixteen bits for long."""
    models = []

    def make(model):
        models.append(model)
        return MoFaSGD(model, lr=5e-4, rank=8, explore=8, weights="int8")

    losses = losses_by_device(make, compiled=compiled)
    assert all(isinstance(model[i].weight, Int8Weight) for model in models for i in (0, 2))
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.01)
    assert losses["cuda"][-1] < 0.9 * losses["cuda"][0]


def test_putting_in_takes_little_more_than_the_result():
    values = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weight = Int8Weight.of(values)
    assert torch.cuda.max_memory_allocated() - before < weight.codes.nbytes + weight.exponents.nbytes + (150 << 20)


def test_a_micro_batch_holds_one_wide_matrix_at_a_time():
    n = 2048
    model = nn.Sequential(*(nn.Linear(n, n, bias=False) for _ in range(8))).to("cuda", torch.bfloat16)
    optimizer = MoFaSGD(model, lr=5e-4, rank=8, weights="int8")
    x = torch.randn(16, n, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x).square().mean().backward()
        peak = torch.cuda.max_memory_allocated() - before
        optimizer.step()
        optimizer.zero_grad()
    assert 2 * n * n <= peak < 2.5 * 2 * n * n
    assert sum(p.codes.nbytes + p.exponents.nbytes for p in model.parameters()) == 8 * n * n * 33 // 32
