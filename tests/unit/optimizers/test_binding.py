"""An optimizer that is built where its model may still be sharded, wrapped or moved: bound at its first use, not before."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_mofa import MoFaSGD


@pytest.fixture
def group():
    """A process group of one, as a launcher starts it on one GPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.LayerNorm(12))


def train(model: nn.Module, optimizer: MoFaSGD, steps: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 12, generator=generator)
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


def put(optimizer: MoFaSGD, model: nn.Module) -> None:
    """Put the parameters that the model has by now into the groups, by position, as Accelerate does."""
    linears = [module for module in model if isinstance(module, nn.Linear)]
    rest = [linears[0].bias, linears[1].bias, *model[3].parameters()]
    for group, params in zip(optimizer.param_groups, ([linear.weight for linear in linears], rest), strict=True):
        group["params"][:] = params


def test_it_trains_what_stands_in_the_groups_at_the_first_forward(group):
    model, plain = build(), build()
    optimizer = MoFaSGD(model, lr=2e-3, rank=4, process_group=dist.group.WORLD)
    for module in model:
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(param.detach().clone()))
    put(optimizer, model)
    trained = train(model, optimizer)
    dist.destroy_process_group()
    try:
        wanted = train(plain, MoFaSGD(plain, lr=2e-3, rank=4))
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert all(torch.equal(one, other) for one, other in zip(trained, wanted))
    assert not any(torch.equal(one, other) for one, other in zip(trained[::2], build().parameters()))  # it moves


def test_until_then_it_keeps_no_parameter_alive(group):
    """Sharding frees a whole weight when nobody refers to it."""
    model = build()
    optimizer = MoFaSGD(model, lr=2e-3, rank=4)
    old = [weakref.ref(param) for param in model.parameters()]
    for module in model:
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(param.detach().clone()))
            del param
    assert any(reference() is not None for reference in old)  # the groups have them
    put(optimizer, model)
    gc.collect()
    assert [reference() for reference in old] == [None] * len(old)


def test_its_state_is_empty_until_then_and_may_be_handed_back(group):
    """As AcceleratedOptimizer does when it wraps one."""
    optimizer = MoFaSGD(build(), lr=2e-3, rank=4)
    state = optimizer.state_dict()
    assert state["state"] == {}
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2, 3, 4, 5]]
    optimizer.load_state_dict(state)
    optimizer.zero_grad()
    optimizer.detach()


def test_a_model_that_waits_can_be_copied_and_pickled(group):
    model = build()
    optimizer = MoFaSGD(model, lr=2e-3, rank=4)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        other(torch.randn(2, 12))
    assert optimizer._matrices is None  # nothing of this has bound it
    model(torch.randn(2, 12))
    assert optimizer._matrices is not None


def test_a_shape_that_has_changed_is_refused(group):
    model = build()
    optimizer = MoFaSGD(model, lr=2e-3, rank=4)
    model[2].weight = nn.Parameter(torch.randn(10, 16))
    put(optimizer, model)
    with pytest.raises(
        ValueError, match=r"'2.weight' was \(12, 16\) when the optimizer was built and is \(10, 16\) now"
    ):
        model(torch.randn(2, 12))


def test_detaching_one_that_waits_leaves_the_model_as_it_was(group):
    model = build()
    MoFaSGD(model, lr=2e-3, rank=4).detach()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    assert not any("_ddp_ignored" in vars(param) for param in model.parameters())


def test_on_meta_it_waits_for_memory():
    """The optimizer between the build on meta and to_empty()."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.LayerNorm(12))
    optimizer = MoFaSGD(model, lr=2e-3, rank=4)
    model.to_empty(device="cpu")
    model.load_state_dict(build().state_dict())
    put(optimizer, model)
    plain = build()
    wanted = train(plain, MoFaSGD(plain, lr=2e-3, rank=4))
    assert all(torch.equal(one, other) for one, other in zip(train(model, optimizer), wanted))
