"""The fused head on a GPU, at a real vocabulary: the dense result, in no more memory than stated."""

import gc

import pytest
import torch
import torch.nn.functional as F

from ds_mofa.capture.head import FusedLoss, peak_bytes
from ds_mofa.capture.sketch import Sketch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS, M, WIDTH, RANK = 2100, 128256, 512, 16  # three chunks in 16 bits


def _problem(dtype, weight_dtype):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape, size=1.0):
        return size * torch.randn(shape, generator=generator, device="cuda")

    x = draw(TOKENS, WIDTH).to(dtype).requires_grad_()
    weight = draw(M, WIDTH, size=0.05).to(weight_dtype).requires_grad_()
    targets = torch.randint(M, (TOKENS,), generator=generator, device="cuda")
    targets[::5] = -100
    U, V = draw(M, RANK).to(dtype), draw(WIDTH, RANK).to(dtype)
    sketch = Sketch(torch.zeros(M, RANK, device="cuda"), torch.zeros(WIDTH, RANK, device="cuda"), U, V)
    return x, weight, targets, sketch


def _dense(x, weight, targets, scale):
    x, weight = (tensor.detach().to(x.dtype).float().requires_grad_() for tensor in (x, weight))
    loss = F.cross_entropy(x @ weight.mT, targets)
    (loss * scale).backward()
    return loss.detach(), x.grad, weight.grad


def _far(ours, dense):
    return float((ours.float() - dense).norm() / dense.norm())


@pytest.mark.parametrize("matrix", [False, True], ids=["adamw", "matrix"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "scale"),
    [
        (torch.bfloat16, torch.bfloat16, 0.5),
        (torch.float16, torch.float16, 2.0**14 / 3),  # DeepSpeed's loss scale
        (torch.bfloat16, torch.float32, 0.5),  # autocast
    ],
    ids=["bf16", "fp16", "autocast"],
)
def test_the_fused_head_is_the_dense_one_within_its_bound(dtype, weight_dtype, scale, matrix):
    x, weight, targets, sketch = _problem(dtype, weight_dtype)
    loss, dx, dw = _dense(x, weight, targets, scale)

    def run():
        x.grad = weight.grad = None
        sketch.Y.zero_(), sketch.Z.zero_()
        items = (targets != -100).sum()
        fused = FusedLoss.apply(x, weight, None, targets, items, -100, sketch if matrix else None)
        (fused * scale).backward()
        return fused.detach()

    run()  # cuBLAS keeps its workspace from the first time on
    x.grad = weight.grad = None
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused = run()
    peak = torch.cuda.max_memory_allocated() - before

    assert _far(fused, loss) < 1e-3
    assert _far(x.grad, dx) < 4e-3
    if matrix:
        assert weight.grad is None
        assert _far(sketch.Y, dw @ sketch.V.float()) < 4e-3 and _far(sketch.Z, dw.mT @ sketch.U.float()) < 4e-3
    else:
        assert weight.grad.dtype == weight_dtype and _far(weight.grad, dw) < 6e-3
    if weight_dtype == dtype:  # else a copy of the weight is there too
        gradient = 0 if matrix else weight.element_size()
        rank = RANK if matrix else 0
        assert peak <= peak_bytes(TOKENS, M, WIDTH, itemsize=2, weight_gradient=gradient, rank=rank, kernel=True)
        assert not matrix or peak < 0.5e9
