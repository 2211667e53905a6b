"""The gradient without memory where linears wait in a queue: what torch does to ``.grad`` on a GPU."""

import pytest
import torch
from torch import nn

from ds_mofa import MoFaSGD
from ds_mofa.optimizers.gradient import SketchedGradient

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


def build(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 64)]
    net = nn.Sequential(*layers).to("cuda", torch.bfloat16)
    return net, MoFaSGD(net, rank=8, lr=2e-3)


def loss(net, seed, factor=1.0):
    x = torch.randn(32, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    return factor * net(x.bfloat16()).float().square().mean()


def warm(net, optimizer):
    for seed in range(2):
        loss(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(net):
    return [param.detach().clone() for param in net.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_queue_serves_and_grad_has_no_memory():
    net, optimizer = build()
    assert optimizer.matrices._queue is not None
    warm(net, optimizer)
    before = torch.cuda.memory_allocated()
    loss(net, 5).backward()
    assert all(isinstance(net[i].weight.grad, SketchedGradient) for i in (0, 2, 4))
    others = sum(p.grad.nbytes for p in net.parameters() if not isinstance(p.grad, SketchedGradient))
    assert torch.cuda.memory_allocated() - before <= 2 * others + 4096


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_torch_s_clipping_is_the_optimizer_s_own(max_norm):
    norms, moved = [], []
    for own in (True, False):
        net, optimizer = build()
        warm(net, optimizer)
        loss(net, 7).backward()
        norms.append(
            float(optimizer.clip_grad_norm_(max_norm) if own else nn.utils.clip_grad_norm_(net.parameters(), max_norm))
        )
        optimizer.step()
        moved.append([state.clone() for state in optimizer.matrices.owner.state.split(4096)])
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)  # torch adds AdamW's norms up in bf16
    for one, other in zip(*moved):
        assert torch.allclose(one, other, rtol=2e-2, atol=2e-2 * float(one.abs().max()))


def test_nothing_waits_for_the_device_in_a_clipped_step():
    net, optimizer = build()
    warm(net, optimizer)
    for _ in range(2):  # the first clipping makes an index
        loss(net, 6).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    loss(net, 7).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    optimizer.step()


@pytest.mark.parametrize("drop", [lambda net, opt: net.zero_grad(), lambda net, opt: opt.zero_grad()])
def test_a_dropped_batch_leaves_nothing_even_if_its_backward_raised(drop):
    results = []
    for bad in (True, False):
        net, optimizer = build()
        warm(net, optimizer)
        if bad:
            loss(net, 5, float("nan")).backward()
            drop(net, optimizer)
            hidden = net[2](net[1](net[0](torch.randn(32, 64, device="cuda", dtype=torch.bfloat16))))
            hidden.register_hook(lambda grad: 1 / 0)  # the last linear waits in the queue when the backward ends here
            with pytest.raises(ZeroDivisionError):
                net[4](net[3](hidden)).float().mul(float("nan")).sum().backward()
            drop(net, optimizer)
        loss(net, 7).backward()
        optimizer.step()
        assert optimizer.matrices.skipped == 0
        results.append(weights(net))
    assert same(*results)


def test_autograd_grad_of_the_input_adds_nothing():
    net, optimizer = build()
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.autograd.grad(net(x).float().square().mean(), x)
    assert not optimizer.matrices.sketches.any()
    with torch.no_grad():
        compiled = torch.compile(net, backend="aot_eager")
    torch.autograd.grad(compiled(x).float().square().mean(), x)
    assert not optimizer.matrices.sketches.any()
    compiled(x).float().square().mean().backward()
    assert optimizer.matrices.sketches.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_fills_the_sketches_as_eager_code_does(dtype):
    found = []
    for compiled in (False, True):
        net, optimizer = build()
        net.to(dtype)
        run = torch.compile(net) if compiled else net
        for seed in range(2):
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
            run(x).float().square().mean().backward()
        optimizer.matrices._queue and optimizer.matrices._queue.flush()
        found.append(optimizer.matrices.sketches.clone())
        optimizer.zero_grad()
    eager, other = found
    assert eager.any()
    assert (other - eager).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * eager.norm()
