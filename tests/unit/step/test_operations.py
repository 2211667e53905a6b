"""How often a step calls the device: on a GPU each operation is launched by the host, which small models wait for."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_mofa import MoFaSGD
from ds_mofa.linalg import exploring, factors, orthonormal
from ds_mofa.rules import mofasgd

SHAPES = [(24, 24), (16, 24), (40, 24), (24, 40)]
MORE = [(32, 24), (24, 32), (48, 24), (24, 48)]


class Operations(TorchDispatchMode):
    """Counts those that compute or copy; views and memory are no launches."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not (operation.is_view or operation.__name__.startswith("empty"))
        return operation(*args, **(kwargs or {}))


def _operations(explore: int, shapes) -> int:
    """Of a step that is no first one, from the reduce to the commit."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes))
    optimizer = MoFaSGD(layers, lr=1e-3, rank=4, explore=explore)
    step = optimizer.matrices
    for _ in range(2):
        step.sketches.normal_()
        step.reduce()
        step.update(optimizer.matrix_groups)
    step.sketches.normal_()
    with Operations() as operations, torch.no_grad():
        step.reduce()
        new = step.driver.update(step._pending, step.steps, 1.0)
        step.driver.publish(new)
        step.driver.commit(new)
    return operations.count


@pytest.mark.parametrize(("explore", "most"), [(0, 360), (4, 540)])
def test_a_step_of_four_shapes_takes_few_operations(explore, most):
    found = _operations(explore, SHAPES)
    assert most / 2 < found <= most


@pytest.mark.parametrize("explore", [0, 4])
def test_what_is_small_is_done_once_for_all_shapes(explore, monkeypatch):
    few, many = (_operations(explore, shapes) for shapes in (SHAPES, SHAPES + MORE))
    assert many < 1.75 * few

    def apart(batches, work, settings=None):
        """The control."""
        given = [(batch,) if isinstance(batch, torch.Tensor) else batch for batch in batches]
        chosen = [()] * len(given) if settings is None else [(setting,) for setting in settings]
        return [work(*tensors, *setting) for tensors, setting in zip(given, chosen)]

    for module in (exploring, factors, orthonormal, mofasgd):
        monkeypatch.setattr(module, "together", apart)
    assert _operations(explore, SHAPES) > 1.75 * few
