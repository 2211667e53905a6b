"""The Triton kernels against their PyTorch twins, on a GPU."""

import math
import warnings

import pytest
import torch
from torch import nn

from ds_mofa import MoFaSGD, Options
from ds_mofa.adamw.eight_bit import AdamW8bit
from ds_mofa.capture.queue import Queue
from ds_mofa.kernels import svd
from ds_mofa.kernels.int8 import whole
from ds_mofa.kernels.random_bits import Rounding, random_bits, round_stochastically
from ds_mofa.kernels.shard import Shard
from ds_mofa.linalg.factors import Factors, update_factors
from ds_mofa.optimizers.gradient import SketchedGradient
from ds_mofa.weights.write import write_updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _eighths(*shape):
    """Numbers whose products and sums are exact in fp32 and tf32, so that the order of a sum cannot matter."""
    return torch.randint(-4, 5, shape).float() / 8


@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [1.0, 1e-4])  # in fp16 the second is subnormal
@pytest.mark.parametrize(
    ("m", "n", "r", "start", "stop"),
    [
        (40, 37, 5, 0, 1480),  # an odd row: no two neighbours are a word
        (40, 37, 5, 50, 777),
        (70, 300, 8, 0, 21000),
        (70, 300, 8, 1002, 20000),  # a shard from the middle of a row to the middle of another
        (70, 300, 8, 3, 20995),
        (70, 300, 8, 2, 20995),
        (70, 300, 8, 1000, 20998),
        (70, 304, 8, 1216, 20000),
        (600, 512, 64, 8192, 300000),
        (33, 1000, 40, 1500, 1502),
        (8, 16, 8, 17, 17),  # an empty shard
        (257, 1030, 128, 0, 264710),
    ],
)
def test_the_write_gives_the_bits_of_its_twin(m, n, r, start, stop, size, dtype, stochastic, masters):
    """The second of three matrices has no coefficients, and stays as it is."""
    torch.manual_seed(0)
    U, V = _eighths(3, m, r).to(dtype), _eighths(3, n, r).to(dtype)
    coefficients = (torch.rand(3, r) > 0.3).to(dtype)
    coefficients[:, 0] = 1
    coefficients[1] = 0
    coefficients[1, ::2] = -0.0
    W = (torch.randn(3, stop - start) * 0.02 * size).to(dtype)
    written = []
    for device in ("cpu", "cuda"):
        parts = W.to(device, copy=True)
        fp32 = 1.125 * parts.float() if masters else None
        write_updates(
            [Shard(part, start) for part in parts],
            U.to(device),
            V.to(device),
            coefficients.to(device),
            numbers=torch.tensor([3, 9, 4]),
            step_size=2.0**-10,
            decay=0.75,
            rounding=Rounding(stochastic, seed=12345, step=7),
            masters=list(fp32) if masters else None,
        )
        written.append((parts.cpu(), fp32.cpu() if masters else None))
    assert torch.equal(written[0][0], written[1][0])
    assert torch.equal(written[1][0][1], W[1])
    if masters:
        assert torch.equal(written[0][1], written[1][1])
        assert torch.equal(written[1][1][1], 1.125 * W[1].float())
    for moved in (0, 2):
        assert start == stop or not torch.equal(written[1][0][moved], W[moved])


@pytest.mark.parametrize("columns", [248, 600])
@pytest.mark.parametrize(("n", "dtype"), [(304, torch.bfloat16), (301, torch.bfloat16), (304, torch.float32)])
def test_factors_of_any_width_are_written(n, dtype, columns):
    """As wide as rank + 2 explore may be: the tiles shrink to what the card's shared memory holds."""
    torch.manual_seed(0)
    U, V = torch.randn(1, 70, columns, dtype=dtype), torch.randn(1, n, columns, dtype=dtype)
    W, ones = torch.randn(1, 70 * n, dtype=dtype), torch.ones(1, columns, dtype=dtype)
    arguments = {"numbers": torch.arange(1), "step_size": 0.01, "decay": 1.0, "rounding": Rounding(False)}
    expected = W.double() - 0.01 * (U.double() @ V.double().mT).flatten(1)
    ours = W.cuda()
    write_updates([Shard(ours[0])], U.cuda(), V.cuda(), ones.cuda(), **arguments)
    torch.testing.assert_close(ours.cpu().double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize(("n", "dtype"), [(304, torch.bfloat16), (301, torch.bfloat16), (304, torch.float32)])
def test_a_coefficient_that_is_no_number_is_written(n, dtype):
    """In fp32 and bf16, in pairs and not: a NaN is not zero, and the weights say so."""
    W = torch.ones(1, 70 * n, dtype=dtype, device="cuda")
    U, V = torch.ones(1, 70, 8, dtype=dtype, device="cuda"), torch.ones(1, n, 8, dtype=dtype, device="cuda")
    coefficients = torch.zeros(1, 8, dtype=dtype, device="cuda")
    coefficients[0, 5] = math.nan
    arguments = {"numbers": torch.arange(1), "step_size": 0.1, "decay": 1.0, "rounding": Rounding(True)}
    write_updates([Shard(W[0])], U, V, coefficients, **arguments)
    assert W.isnan().all()


@pytest.mark.parametrize("options", [{}, {"explore": 4, "balance": 0.5}, {"master_weights": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_matrix_without_a_gradient_stays_and_costs_no_wait(dtype, options):
    """Of three in one batch: every bit of its weights and state, and the host waits for the device as often as ever."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(3)).to("cuda", dtype)
    optimizer = MoFaSGD(layers, rank=8, lr=2e-3, weight_decay=0.5, **options)
    step = optimizer.matrices
    x, waits = torch.randn(256, 128, device="cuda", dtype=dtype), []
    for number in range(8):
        used = [0, 2] if number in (0, 1, 4, 5) else [0, 1, 2]
        before = [layer.weight.detach().clone() for layer in layers]
        factors = [view.clone() for view in step.owner.state_layout.views(step.factors, 1)]
        sum(layers[i](x).float().square().mean() for i in used).backward()
        step.reduce()
        assert step.finite
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("called a synchronizing" in str(warning.message) for warning in caught))
        optimizer.zero_grad()
        moved = [not torch.equal(layer.weight, weight) for layer, weight in zip(layers, before)]
        assert moved == [i in used for i in range(3)], number
        kept = [torch.equal(a, b) for a, b in zip(step.owner.state_layout.views(step.factors, 1), factors)]
        assert all(kept) == (1 not in used and number > 0)
    assert waits[4] == waits[5] == waits[6] == waits[7]


def test_the_write_of_fp32_weights_agrees_to_rounding():
    torch.manual_seed(0)
    U, V, W = torch.randn(1, 70, 8), torch.randn(1, 300, 8), torch.randn(1, 21000)
    cpu, gpu = W.clone(), W.cuda()
    for device, parts in (("cpu", cpu), ("cuda", gpu)):
        ones = torch.ones(1, 8, device=device)
        arguments = {"numbers": torch.arange(1), "step_size": 0.1, "decay": 0.9, "rounding": Rounding(True)}
        write_updates([Shard(parts[0])], U.to(device), V.to(device), ones, **arguments)
    assert (gpu.cpu() - cpu).norm() / cpu.norm() < 1e-6


def test_random_words_are_counted_in_32_bits_beyond_two_billion_elements():
    """A matrix of 2^31 elements and more is addressed right: its last row gets its own bits."""
    m, n = 70000, 32768
    if torch.cuda.mem_get_info()[0] < 6 * m * n:
        pytest.skip("needs 14 GB")
    W = torch.full((m * n,), 1.0, dtype=torch.bfloat16, device="cuda")
    U, V = torch.ones(1, m, 1, device="cuda").bfloat16(), torch.ones(1, n, 1, device="cuda").bfloat16()
    arguments = {"numbers": torch.arange(1), "step_size": 2.0**-12, "decay": 1.0, "rounding": Rounding(True, 1, 1)}
    write_updates([Shard(W)], U, V, U[:, :1, 0], **arguments)
    row = torch.full((n,), 1.0, dtype=torch.bfloat16)
    key, turn = Rounding(True, 1, 1).weight_key(0), Rounding(True, 1, 1).turn
    bits = random_bits((m - 1) * n, n, key, row.device, turn)
    expected = round_stochastically(row.float() - 2.0**-12, bits, torch.bfloat16).bfloat16()
    assert torch.equal(W[-n:].cpu(), expected)


def _cores(kind, rows, columns):
    K = torch.randn(5, rows, columns, device="cuda")
    if kind == "rank one":
        K = torch.randn(5, rows, 1, device="cuda") @ torch.randn(5, 1, columns, device="cuda")
    elif kind == "zero":
        K = torch.zeros_like(K)
    elif kind == "graded":
        K = K * torch.logspace(0, -6, columns, device="cuda")
    elif kind == "tiny":
        K = K * 1e-30
    elif kind == "core":
        K[:, rows // 2 :, columns // 2 :] = 0
    return K


def _assert_svd(K, scaled, sigma, Q):
    """To rounding relative to the largest singular value, and Q orthonormal for every K."""
    _, expected, _ = svd.jacobi_svd_twin(K.double())
    norm = K.double().norm(dim=(-2, -1), keepdim=True).clamp_min(1e-300)
    assert ((sigma - expected).norm(dim=-1, keepdim=True) / norm[..., 0]).max() < 2e-6
    products = K.double() @ Q.double()
    assert ((products - scaled) / norm).abs().max() < 1e-6
    gram = (products / norm).mT @ (products / norm)
    assert (gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-6
    identity = torch.eye(Q.shape[-1], device=Q.device)
    assert (Q.double().mT @ Q.double() - identity).abs().max() < 2e-6
    assert (sigma[:, :-1] >= sigma[:, 1:]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("r", [1, 8, 20, 32, 128])
@pytest.mark.parametrize(("m", "n"), [(256, 128), (130, 384), (33, 40), (512, 1024)])
@pytest.mark.parametrize("tokens", [1, 70, 256])
def test_many_linears_sketched_together_are_each_sketched(tokens, m, n, r, dtype):
    """And one that is taken alone has the same bits, though its tiles are smaller."""
    torch.manual_seed(0)
    queue = Queue(r, dtype)
    sketches, expected, alone = [], [], []
    for index in range(3):
        x, dy = (torch.randn(2, tokens + index, size, device="cuda").to(dtype) for size in (n, m))
        U, V = (torch.randn(size, r, device="cuda").to(dtype) for size in (m, n))
        Y, Z = (torch.randn(size, r, device="cuda") for size in (m, n))
        X, dY = x.view(-1, n).double(), dy.view(-1, m).double()
        left, right = (X @ V.double()).to(dtype).double(), (dY @ U.double()).to(dtype).double()
        expected.append((Y + dY.T @ left, Z + X.T @ right))
        sketches.append((Y, Z, U, V))
        queue._waiting.append((tuple(tensor.data_ptr() for tensor in sketches[-1]), x, dy))
        alone.append((Y.clone(), Z.clone()))
        Queue(r, dtype).take([(tuple(tensor.data_ptr() for tensor in (*alone[-1], U, V)), x, dy)])
    queue.flush()
    for (Y, Z, _, _), exact, (one_Y, one_Z) in zip(sketches, expected, alone):
        assert torch.equal(Y, one_Y) and torch.equal(Z, one_Z)
        for got, sketch in zip((Y, Z), exact):
            assert (got - sketch).norm() / sketch.norm() < (
                5e-3 if dtype == torch.bfloat16 else 1e-3
            )  # the products' own rounding
    assert not queue._waiting


def test_a_backward_takes_all_that_waits():
    """By the count, by the bytes, and what is left at its end; the sum is that of the products one by one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(5)]).to("cuda", torch.bfloat16)
    optimizer = MoFaSGD(model, lr=1e-3, rank=8)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)

    def captured(**patches):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in patches.items():
                patch.setattr(Queue, name, value)
            optimizer.zero_grad()
            model(x).float().square().sum().backward()
            assert not optimizer.matrices._queue._waiting
        return optimizer.matrices.sketches.clone()

    at_the_end = captured(COUNT=16, BYTES=10**9)
    assert torch.equal(captured(COUNT=1), at_the_end)
    assert torch.equal(captured(COUNT=2), at_the_end)
    assert torch.equal(captured(BYTES=100_000), at_the_end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_mofa.capture.sketch.Sketch.add_linear", _one_by_one)
        one_by_one = captured()
    assert one_by_one.norm() > 0 and (at_the_end - one_by_one).norm() / one_by_one.norm() < 5e-3


def test_a_linear_that_is_used_again_adds_all_of_its_uses():
    """As ALBERT's layers are, within what one launch takes: in each of many backwards, since a race is not lost every time."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(1024, 1024, bias=False).to("cuda", torch.bfloat16)
    optimizer = MoFaSGD(torch.nn.Sequential(linear), lr=1e-3, rank=8)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)

    def captured():
        optimizer.zero_grad()
        sum(linear(k * x).float().square().sum() for k in range(1, 9)).backward()
        return optimizer.matrices.sketches.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_mofa.capture.sketch.Sketch.add_linear", _one_by_one)
        expected = captured()
    for _ in range(20):
        assert (captured() - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("options", [{}, {"explore": 8}, {"fp8": True}, {"weights": "int8"}], ids=str)
def test_a_model_need_not_be_on_the_current_device(options):
    trained = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(5)]).to(device, torch.bfloat16)
        optimizer = MoFaSGD(model, lr=1e-3, rank=8, **options)
        for _ in range(4):
            x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append({name: whole(weight.detach()).cpu() for name, weight in model.named_parameters()})
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())


def _one_by_one(self, x, dy):
    self.Y += dy.float().mT @ (x @ self.V).float()
    self.Z += x.float().mT @ (dy @ self.U).float()


@pytest.mark.parametrize(
    "rows,columns",
    [
        (8, 8),
        (6, 7),
        (7, 6),
        (16, 16),
        (20, 30),
        (32, 32),
        (40, 50),
        (64, 64),
        (96, 96),
        (100, 130),
        (128, 128),
        (256, 256),
    ],
)
@pytest.mark.parametrize("kind", ["generic", "rank one", "zero", "graded", "tiny", "core"])
def test_jacobi_agrees_with_the_library(kind, rows, columns):
    torch.manual_seed(0)
    K = _cores(kind, rows, columns)
    _assert_svd(K, *svd.jacobi_svd(K))


@pytest.mark.parametrize("columns", [32, 64, 128])
@pytest.mark.parametrize("kind", ["generic", "core"])
def test_by_columns_and_by_blocks_at_every_size(kind, columns):
    torch.manual_seed(0)
    K = _cores(kind, columns, columns)
    for Q in (svd.rotations_by_columns(K), svd.rotations_by_blocks(K, svd._sweeps)):
        _assert_svd(K, *svd._sorted_triplets(K, Q))


def test_a_large_jacobi_does_not_wait_for_the_device():
    K = _cores("generic", 128, 128)
    svd.jacobi_svd(K)
    torch.cuda.set_sync_debug_mode("error")
    try:
        svd.jacobi_svd(K)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["generic", "rank one", "zero", "inside", "graded"])
@pytest.mark.parametrize(("m", "n", "r"), [(300, 200, 32), (40, 30, 4), (12, 50, 8), (64, 64, 64), (600, 500, 128)])
def test_the_update_on_a_gpu_is_the_dense_one(m, n, r, kind):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(3, size, r, device="cuda")).Q for size in (m, n))
    sigma = torch.rand(3, r, device="cuda").sort(-1, descending=True).values
    G = torch.randn(3, m, n, device="cuda")
    if kind == "rank one":
        G = torch.randn(3, m, 1, device="cuda") @ torch.randn(3, 1, n, device="cuda")
    elif kind == "zero":
        G = torch.zeros_like(G)
    elif kind == "inside":
        G = U @ torch.randn(3, r, r, device="cuda") @ V.mT
    elif kind == "graded":
        G = G * torch.logspace(0, -9, n, device="cuda")
    new = update_factors(Factors(U, sigma, V), G @ V, G.mT @ U, beta=0.85, gamma=0.15)

    U, V, sigma, G = (x.double() for x in (U, V, sigma, G))
    projected = U @ (U.mT @ G) + G @ V @ V.mT - U @ (U.mT @ G @ V) @ V.mT
    P, S, Qt = torch.linalg.svd(0.85 * U @ torch.diag_embed(sigma) @ V.mT + 0.15 * projected, full_matrices=False)
    best = P[..., :r] @ torch.diag_embed(S[..., :r]) @ Qt[..., :r, :]
    got = new.U.double() @ torch.diag_embed(new.sigma.double()) @ new.V.double().mT
    assert (got - best).norm() / best.norm() < 1e-4
    for factor in (new.U, new.V):
        assert (factor.mT @ factor - torch.eye(r, device="cuda")).abs().max() < 1e-5


def test_a_bf16_model_learns_and_keeps_no_weight_gradient():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(64, 128), torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
    ).to("cuda", torch.bfloat16)
    optimizer = MoFaSGD(model, lr=4e-3, adjust_lr_fn="adamw", rank=8)
    ids = torch.randint(64, (16, 32), device="cuda")
    losses = []
    for _ in range(60):
        logits = model(ids).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(1, 1).flatten())
        loss.backward()
        assert isinstance(model[1].weight.grad, SketchedGradient)  # without memory
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_8_bit_moments_of_more_than_two_billion_elements():
    """AdamW's step of the last elements of a tensor of 2^31 and more is that of a small tensor, compiled."""
    pytest.importorskip("torchao")
    size, tail = 2**31 + 1024, 1024
    if torch.cuda.mem_get_info()[0] < 8 * size:
        pytest.skip("needs 17 GB")
    start, grad = torch.randn(tail, device="cuda"), torch.randn(tail, device="cuda")
    ends = []
    for numel in (size, 4096 + tail):
        param = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device="cuda"))
        param.grad = torch.zeros_like(param)
        with torch.no_grad():
            param[-tail:], param.grad[-tail:] = start, grad
        optimizer = AdamW8bit([param], Options(lr=2e-3, rounding="nearest"))
        for _ in range(2):
            optimizer.step()
        ends.append((param.detach()[-tail:].clone(), int(param.detach()[:-tail].count_nonzero())))
        del param, optimizer
    assert torch.equal(ends[0][0], ends[1][0]) and not torch.equal(ends[0][0], start.bfloat16())
    assert ends[0][1] == ends[1][1] == 0
