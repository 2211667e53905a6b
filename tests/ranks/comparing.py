"""What the ranks should have got, from the dense reference, and how far what they got is from it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from galore_reference import GaLoreReference
from launching import Ran
from reference import Reference
from torch import nn
from toys import Toy, batches
from training import GALORE, OPTIONS, toy

__all__ = ["STEPS", "TOLERANCE", "assert_same", "dense", "distances", "equal"]

STEPS = 5
TOLERANCE = 1e-5


@functools.cache
def dense(
    model: type[nn.Module] = Toy,
    *,
    steps: int = STEPS,
    data: Callable[[int], list] = batches,
    matrices: tuple[str, ...] | None = None,
    frozen: bool = False,
    rank: int = OPTIONS["rank"],
    beta: float = 0.85,
    lr: float | Callable[[int], float] | None = None,
    optimizer: str = "MoFaSGD",
    **settings: Any,
) -> dict:
    """The reference's counterpart of ``training.train``, and the gradient norm of every step.

    Args:
        data: makes the batches.
        lr: None: the optimizer's in :mod:`training`.
        matrices: in the place of the model's.
        frozen: leave the matrices out.
        **settings: others of :class:`reference.Reference`.
    """
    built, matrices = toy(model), matrices or model.MATRICES
    if frozen:
        for name in matrices:
            built.get_parameter(name).requires_grad_(False)
    settings = {key: OPTIONS[key] for key in ("weight_decay", "adamw_eps")} | settings
    if lr is None:
        lr = (GALORE if optimizer == "GaLore" else OPTIONS)["lr"]
    if optimizer == "GaLore":
        rule = {key: GALORE[key] for key in ("refresh_every", "alpha", "eps")} | {"betas": (0.9, 0.999)}
        reference = GaLoreReference(built, matrices, lr=lr, rank=rank, **{**rule, **settings})
    else:
        reference = Reference(built, [] if frozen else matrices, lr=lr, rank=rank, beta=beta, **settings)
    *train, last = data(steps + 1)
    losses, norms = [], []
    for batch in train:
        losses.append(reference.step(batch))
        norms.append(reference.norm)
    return {
        "losses": [*losses, reference.loss(last)],
        "weights": reference.weights(),
        "momenta": {name: momentum.M for name, momentum in reference.momenta.items()},
        "norms": norms,
    }


def distances(result: dict, wanted: dict) -> dict[str, float]:
    """Largest relative difference of the losses, and of the weights and of the momenta in Frobenius norm."""
    far = {"losses": max(abs(x - y) / y for x, y in zip(result["losses"], wanted["losses"], strict=True))}
    for kind in ("weights", "momenta"):
        pairs = [(result[kind][name].double(), value) for name, value in wanted[kind].items() if result[kind]]
        far[kind] = max([float((x - y).norm() / y.norm()) for x, y in pairs], default=0.0)
    return far


def assert_same(ran: Ran, wanted: dict, tolerance: float = TOLERANCE) -> None:
    """Every rank has the losses and all weights of ``wanted``; rank 0, which has them all, its momenta too."""
    assert ran.ranks[0]["momenta"].keys() == wanted["momenta"].keys()
    for result in ran.ranks:
        assert result["weights"].keys() == wanted["weights"].keys()
        far = distances(result, wanted)
        assert max(far.values()) < tolerance, far


def equal(a, b) -> bool:
    """The same tensors bit for bit, and the same of everything around them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
