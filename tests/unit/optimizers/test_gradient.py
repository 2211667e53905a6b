"""What stands in a matrix's ``.grad``: torch's own clipping, scaling, dropping and setting do what they do to a gradient.

Everywhere the right value is that of the same steps taken with ``exclude``-free MoFaSGD on gradients that autograd has
made itself and that are handed over with ``p.grad = G``, or of one backward over the same sum.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from ds_mofa import GaLore, MoFaSGD
from ds_mofa.optimizers.gradient import SketchedGradient
from tests.unit.dense_reference import relative_error

CAPTURES = pytest.mark.parametrize("capture", ["linear", "hook"])
KINDS = pytest.mark.parametrize("kind", [MoFaSGD, GaLore])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm, self.last = (
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
        )

    def forward(self, x):
        return self.last(self.norm(self.second(torch.tanh(self.first(x)))))


def build(kind=MoFaSGD, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    net = Net().to(dtype)
    return net, kind(net, **{"lr": 2e-3, "rank": 3, **options})


def loss(net, seed, factor=1.0):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor * net(x.to(net.first.weight.dtype)).square().mean()


def weights(net):
    return {name: param.detach().clone() for name, param in net.named_parameters()}


def distance(one, other):
    return max(relative_error(one[name], other[name]) for name in other)


def warm(net, optimizer, steps=2):
    """Some steps, so that there is momentum."""
    for seed in range(steps):
        loss(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def gradients(net, seed, factor=1.0):
    """Autograd's, on a copy that no optimizer has seen."""
    plain = Net().to(net.first.weight.dtype)
    plain.load_state_dict(net.state_dict())
    loss(plain, seed, factor).backward()
    return {name: param.grad for name, param in plain.named_parameters()}


# ---------------------------------------------------------------------- what it is


@CAPTURES
def test_it_has_the_shape_of_a_gradient_and_no_memory(capture):
    net, optimizer = build(capture=capture)
    assert net.first.weight.grad is None
    loss(net, 0).backward()
    grad = net.first.weight.grad
    assert isinstance(grad, SketchedGradient) and "first.weight" in repr(grad)
    assert (grad.shape, grad.dtype, grad.device) == (net.first.weight.shape, torch.float64, net.first.weight.device)
    assert grad.detach() is grad
    optimizer.zero_grad()
    assert net.first.weight.grad is None


def test_a_large_one_costs_nothing():
    tall = nn.Parameter(torch.empty(1, 1).expand(10**7, 10**7))
    assert SketchedGradient(tall.shape, tall, "tall", type("Owner", (), {})(), 0).shape == (10**7, 10**7)


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.grad + p,
        lambda p: p.grad.abs(),
        lambda p: p.grad.sum(),
        lambda p: p.grad.norm(1),
        lambda p: p.grad.norm(dim=0),
        lambda p: p.grad.clone(),
        lambda p: p.grad.to(torch.float32),
        lambda p: p.grad.tolist(),
        lambda p: p.grad.numpy(),
        lambda p: p.grad[0],
        lambda p: p.data.add_(p.grad),
        lambda p: torch.nn.utils.clip_grad_value_([p], 1.0),
        lambda p: torch.nn.utils.clip_grad_norm_([p], 1.0, norm_type=1),
        lambda p: torch.optim.SGD([p], lr=1.0).step(),
        lambda p: torch.optim.AdamW([p], lr=1.0, weight_decay=0).step(),
        lambda p: torch.optim.AdamW([p], lr=1.0, weight_decay=0, foreach=False).step(),
    ],
)
def test_what_needs_its_elements_raises_by_name_and_changes_nothing(use):
    net, _optimizer = build()
    loss(net, 0).backward()
    before = weights(net)
    with pytest.raises((NotImplementedError, RuntimeError), match="first.weight|[Ss]torage|numpy|subclasses"):
        use(net.first.weight)
    assert distance(weights(net), before) == 0


# ---------------------------------------------------------------------- clipping


@KINDS
@CAPTURES
@pytest.mark.parametrize("started", [0, 2])
@pytest.mark.parametrize("max_norm", [1e-2, 1e6])
def test_torch_s_clipping_is_the_optimizer_s_own(kind, capture, started, max_norm):
    results = []
    for own in (True, False):
        net, optimizer = build(kind, capture=capture)
        warm(net, optimizer, started)
        for seed in (7, 8):
            loss(net, seed).backward()
            clip = optimizer.clip_grad_norm_ if own else lambda m: torch.nn.utils.clip_grad_norm_(net.parameters(), m)
            norm = clip(max_norm)
            optimizer.step()
            optimizer.zero_grad()
        results.append((float(norm), weights(net)))
    (norm, moved), (theirs, also) = results
    assert theirs == pytest.approx(norm, rel=1e-6)
    assert distance(also, moved) < 1e-6


def test_the_norm_of_one_matrix_is_its_projection_s():
    net, optimizer = build()
    warm(net, optimizer)
    G = gradients(net, 7)
    loss(net, 7).backward()
    for matrix, sketch in zip(optimizer.split.matrices, optimizer.matrices.captured):
        U, V, g = sketch.U, sketch.V, G[matrix.name]
        projected = U @ U.mT @ g + g @ V @ V.mT - U @ U.mT @ g @ V @ V.mT
        assert float(matrix.param.grad.norm()) == pytest.approx(float(projected.norm()), rel=1e-6)
    total = torch.nn.utils.clip_grad_norm_([matrix.param for matrix in optimizer.split.matrices], 1e9)
    assert float(total) == pytest.approx(float(optimizer.matrices.norm), rel=1e-6)


@CAPTURES
def test_clipping_some_of_the_matrices_scales_those_alone(capture):
    net, optimizer = build(capture=capture)
    other, reference = build(capture=capture)
    for some, its in ((net, optimizer), (other, reference)):
        warm(some, its)
    loss(net, 7).backward()
    norm = torch.nn.utils.clip_grad_norm_([net.first.weight, net.first.bias], 1e-3)
    optimizer.step()
    factor = 1e-3 / (float(norm) + 1e-6)
    for name, grad in gradients(other, 7).items():
        other.get_parameter(name).grad = grad * (factor if name.startswith("first") else 1.0)
    reference.step()
    assert distance(weights(net), weights(other)) < 1e-6


def test_what_comes_after_a_clipping_counts_unclipped():
    """Clip after the first micro-batch of two: torch scales what is there, and adds the rest to it."""
    net, optimizer = build()
    other, reference = build()
    for some, its in ((net, optimizer), (other, reference)):
        warm(some, its)
    loss(net, 7).backward()
    factor = 1e-3 / (float(torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)) + 1e-6)
    loss(net, 8).backward()
    optimizer.step()
    first, second = gradients(other, 7), gradients(other, 8)
    for name, param in other.named_parameters():
        param.grad = first[name] * factor + second[name]
    reference.step()
    assert distance(weights(net), weights(other)) < 1e-6
    moved, still = build(), build()
    warm(*moved), warm(*still)
    loss(still[0], 8).backward()
    still[1].step()
    assert distance(weights(still[0]), weights(net)) > 1e-5, "the first micro-batch must be felt, or this shows nothing"


@CAPTURES
def test_own_clipping_then_another_backward_counts_it(capture):
    results = []
    for clip in ("own", "torch"):
        net, optimizer = build(capture=capture)
        warm(net, optimizer)
        loss(net, 7).backward()
        optimizer.clip_grad_norm_(1e-3) if clip == "own" else torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        loss(net, 8).backward()
        optimizer.step()
        results.append(weights(net))
    assert distance(*results) < 1e-6


def test_a_gradient_that_is_not_finite_is_seen_by_torch_s_clipping():
    net, _optimizer = build()
    loss(net, 0, factor=float("nan")).backward()
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)


# ---------------------------------------------------------------------- GradScaler


@CAPTURES
@pytest.mark.parametrize("clip", [None, 1e-2])
def test_a_grad_scaler_is_honoured(capture, clip):
    results = []
    for enabled in (False, True):
        net, optimizer = build(capture=capture, dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=enabled)
        for seed in range(5):
            scaler.scale(loss(net, seed)).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(weights(net))
        assert not enabled or scaler.get_scale() == 2.0**14
    assert distance(*results) < 1e-5


def test_a_grad_scaler_skips_a_step_for_a_matrix_alone():
    net, optimizer = build(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    warm(net, optimizer)
    before = weights(net)
    scaler.scale(loss(net, 7)).backward()
    optimizer.matrices.captured[0].Y[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert distance(weights(net), before) == 0 and scaler.get_scale() == 2.0**11


# ---------------------------------------------------------------------- dropped and set


DROPS = {
    "model.zero_grad": lambda net, optimizer: net.zero_grad(),
    "to zero": lambda net, optimizer: net.zero_grad(set_to_none=False),
    "optimizer.zero_grad": lambda net, optimizer: optimizer.zero_grad(),
    "by hand": lambda net, optimizer: [setattr(param, "grad", None) for param in net.parameters()],
}


@CAPTURES
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("drop", DROPS)
def test_a_batch_that_was_dropped_leaves_nothing(drop, clipped, capture):
    results = []
    for bad in (True, False):
        net, optimizer = build(capture=capture)
        warm(net, optimizer)
        if bad:
            loss(net, 5, factor=float("nan")).backward()
            if clipped:
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            DROPS[drop](net, optimizer)
        loss(net, 7).backward()
        optimizer.step()
        assert optimizer.matrices.skipped == 0
        results.append(weights(net))
    assert distance(*results) == 0


@CAPTURES
def test_one_matrix_dropped_after_the_backward_does_not_feel_it(capture):
    net, optimizer = build(capture=capture, beta=0.0)
    warm(net, optimizer)
    loss(net, 7, factor=float("nan")).backward()
    for param in net.parameters():
        param.grad = None
    loss(net, 8).backward()
    net.first.weight.grad = None
    optimizer.matrices.claim.check()
    optimizer.step()
    assert optimizer.matrices.skipped == 0
    assert all(torch.isfinite(value).all() for value in weights(net).values())


@CAPTURES
@pytest.mark.parametrize("after_a_backward", [False, True])
def test_a_gradient_set_by_hand_is_the_gradient(capture, after_a_backward):
    net, optimizer = build(capture=capture)
    other, reference = build(capture=capture)
    for some, its in ((net, optimizer), (other, reference)):
        warm(some, its)
    made = gradients(net, 7)
    if after_a_backward:
        loss(net, 9).backward()
    for name, param in net.named_parameters():
        param.grad = made[name]
    optimizer.step()
    loss(other, 7).backward()
    reference.step()
    assert distance(weights(net), weights(other)) < 1e-9


@CAPTURES
def test_a_gradient_set_by_hand_is_added_to(capture):
    net, optimizer = build(capture=capture)
    other, reference = build(capture=capture)
    for some, its in ((net, optimizer), (other, reference)):
        warm(some, its)
    for name, grad in gradients(net, 7).items():
        net.get_parameter(name).grad = grad
    loss(net, 8).backward()
    optimizer.step()
    for seed in (7, 8):
        loss(other, seed).backward()
    reference.step()
    assert distance(weights(net), weights(other)) < 1e-9


def test_a_gradient_may_be_scaled_by_hand():
    net, optimizer = build()
    other, reference = build()
    for some, its in ((net, optimizer), (other, reference)):
        warm(some, its)
    loss(net, 7).backward()
    for param in net.parameters():
        param.grad.mul_(0.25).div_(2.0)
    optimizer.step()
    loss(other, 7, factor=0.125).backward()
    reference.step()
    assert distance(weights(net), weights(other)) < 1e-9


# ---------------------------------------------------------------------- hooks, graphs, copies


@CAPTURES
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_on_a_weight_is_called_with_the_gradient_and_heeded(when, capture):
    torch.manual_seed(0)
    net = Net().double()
    plain, seen, mask = copy.deepcopy(net), [], torch.zeros(12, 1, dtype=torch.float64)
    mask[:4] = 1

    def hook(grad):
        seen.append(grad.clone())
        return grad * mask

    if when == "before":
        net.first.weight.register_hook(hook)
    optimizer = MoFaSGD(net, rank=3, capture=capture)
    if when == "after":
        net.first.weight.register_hook(hook)
    loss(net, 3).backward(), loss(plain, 3).backward()
    assert torch.allclose(seen[0], plain.first.weight.grad)
    sketch = optimizer.matrices.captured[0]
    assert relative_error(sketch.Y, (plain.first.weight.grad * mask) @ sketch.V) < 1e-12
    assert not sketch.Y[4:].any()


@CAPTURES
def test_autograd_grad_of_the_weights_gives_their_gradients_and_adds_nothing(capture):
    net, optimizer = build(capture=capture)
    names = [name for name, _ in net.named_parameters()]
    made = torch.autograd.grad(loss(net, 3), list(net.parameters()))
    for name, grad in zip(names, made):
        assert relative_error(grad, gradients(net, 3)[name]) < 1e-12
    assert not optimizer.matrices.sketches.any()


def test_a_graph_from_before_the_step_raises_as_under_torch_s_optimizers():
    net, optimizer = build()
    old = loss(net, 0)
    loss(net, 1).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


@pytest.mark.parametrize("copy_it", [copy.deepcopy, pickle.dumps])
def test_an_optimizer_cannot_be_copied_and_says_what_can(copy_it):
    _, optimizer = build()
    with pytest.raises(TypeError, match="state_dict"):
        copy_it(optimizer)


def test_a_saved_model_loads_plain_and_can_be_trained_again(tmp_path):
    net, optimizer = build()
    warm(net, optimizer)
    loss(net, 7).backward()
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    loss(loaded, 7).backward()
    assert type(loaded.first.weight.grad) is torch.Tensor
    loaded.zero_grad()
    again = MoFaSGD(loaded, rank=3, lr=2e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's AdamW keeps the very tensors
    loss(loaded, 7).backward()
    again.step(), optimizer.step()
    assert distance(weights(loaded), weights(net)) < 1e-12


def test_torchscript_and_tracing_see_a_plain_linear():
    net, _optimizer = build()
    x = torch.randn(5, 8, dtype=torch.float64)
    for made in (torch.jit.script(net), torch.jit.trace(net, x)):
        assert torch.allclose(made(x), net(x))


# ---------------------------------------------------------------------- owners


@CAPTURES
def test_when_the_optimizer_is_gone_the_model_is_any_model(capture):
    net, optimizer = build(capture=capture)
    loss(net, 0).backward()
    held = weakref.ref(optimizer.matrices)
    del optimizer
    gc.collect()
    assert held() is None, "something in the model keeps the optimizer's buffers"
    assert net.first.weight.grad is None and "forward" not in vars(net.first)
    adamw, before = torch.optim.AdamW(net.parameters(), lr=2e-3), weights(net)
    loss(net, 0).backward()
    adamw.step()
    assert all(not torch.equal(value, before[name]) for name, value in weights(net).items())


@CAPTURES
def test_the_optimizer_built_last_trains_the_model_and_the_earlier_one_is_told(capture, caplog):
    net, earlier = build(capture=capture)
    warm(net, earlier)
    loss(net, 2).backward()
    later = MoFaSGD(net, rank=3, lr=2e-3, capture=capture)
    assert "takes over the matrices of a MoFaSGD" in caplog.text
    assert net.first.weight.grad is None
    before = weights(net)
    loss(net, 3).backward()
    with pytest.raises(RuntimeError, match="another MoFaSGD was built later.*first.weight"):
        earlier.step()
    later.step()
    alone = Net().double()
    alone.load_state_dict(before)
    reference = MoFaSGD(alone, rank=3, lr=2e-3, capture=capture)
    loss(alone, 3).backward()
    alone.norm.zero_grad()
    del earlier
    gc.collect()
    loss(net, 4).backward()
    assert later.matrices.sketches.any(), "the earlier one's end must not take the later one off"
    reference.step()
    for name in ("first.weight", "second.weight", "last.weight"):
        assert relative_error(weights(net)[name], weights(alone)[name]) < 1e-9


def test_two_optimizers_over_a_shared_module_are_refused_by_name():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    one, other = nn.Sequential(shared, nn.Linear(8, 8)), nn.Sequential(shared, nn.Linear(8, 8))
    first, second = MoFaSGD(one, rank=3), MoFaSGD(other, rank=3)
    x = torch.randn(5, 8)
    (one(x).square().mean() + other(x).square().mean()).backward()
    with pytest.raises(RuntimeError, match="0.weight"):
        first.step()
    before = shared.weight.detach().clone()
    second.step()
    assert not torch.equal(shared.weight, before)


def test_another_optimizer_beside_a_living_one_is_refused_until_that_is_detached():
    net, optimizer = build()
    adamw = torch.optim.AdamW(net.parameters(), lr=2e-3)
    loss(net, 0).backward()
    with pytest.raises(NotImplementedError, match=r"detach\(\)"):
        adamw.step()
    optimizer.detach()
    before = weights(net)
    loss(net, 0).backward()
    adamw.step()
    assert all(not torch.equal(value, before[name]) for name, value in weights(net).items())


# ---------------------------------------------------------------------- parameters that are no more, or not yet


def test_a_parameter_that_has_been_replaced_is_refused_at_the_step():
    net, optimizer = build()
    warm(net, optimizer)
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    loss(net, 3).backward()
    with pytest.raises(RuntimeError, match="weight is in the model no more.*after that"):
        optimizer.step()


def test_a_model_that_was_moved_after_the_build_is_refused():
    net, optimizer = build()
    sketch, elsewhere = optimizer.matrices.captured[0], nn.Parameter(net.first.weight.detach().to("meta"))
    # As it was made before the move.
    sketch.grad = SketchedGradient(elsewhere.shape, elsewhere, "first.weight", optimizer._gradients, 0)
    with pytest.raises(RuntimeError, match="'first.weight' was on meta .*move the model before that"):
        loss(net, 3).backward()


def test_unfreezing_after_the_build_is_said_once(caplog):
    torch.manual_seed(0)
    net = Net().double()
    net.first.requires_grad_(False)
    optimizer = MoFaSGD(net, rank=3)
    warm(net, optimizer)
    assert "frozen" not in caplog.text
    net.first.requires_grad_(True)
    warm(net, optimizer, 3)
    assert caplog.text.count("frozen when the optimizer was built") == 1 and "first.weight" in caplog.text


def test_the_split_is_printed_in_a_plain_loop(capsys):
    build()
    assert "ds_mofa: 3 matrices on MoFaSGD" in capsys.readouterr().out


def test_several_processes_that_came_after_the_build_are_refused_at_the_step(monkeypatch):
    net, optimizer = build()
    loss(net, 0).backward()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    before = weights(net)
    with pytest.raises(ValueError, match="several processes"):
        optimizer.step()
    assert distance(weights(net), before) == 0


def test_a_model_in_partitions_is_refused():
    torch.manual_seed(0)
    net = Net()
    net.first.weight.ds_tensor = torch.empty(0)  # as zero.Init leaves it
    with pytest.raises(ValueError, match="stage 3.*deepspeed.initialize"):
        MoFaSGD(net, rank=3)


def test_whatever_is_wrong_with_a_state_is_told_to_all(monkeypatch):
    _, optimizer = build()
    monkeypatch.setattr("ds_mofa.step.step.unpack", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        optimizer.load_state_dict(optimizer.state_dict())


def test_matrices_without_a_gradient_cost_a_clipped_step_no_measuring(monkeypatch):
    net, optimizer = build()
    warm(net, optimizer)
    measured = []
    measure = optimizer.matrices.measure
    monkeypatch.setattr(optimizer.matrices, "measure", lambda: (measured.append(1), measure()))
    net.second(torch.randn(5, 12, dtype=torch.float64)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.step()
    assert len(measured) == 1
