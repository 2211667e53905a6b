"""A model that learns to give back what it gets: the losses of a short run."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def losses(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    steps: int,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> list[float]:
    """Before each of ``steps`` on x; ``forward`` is the model's own, or what computes the same."""
    forward, found = forward or model, []
    for _ in range(steps):
        loss = (forward(x) - x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def losses_by_device(make: Callable[[nn.Module], torch.optim.Optimizer], *, compiled: bool) -> dict[str, list[float]]:
    """Of ten steps of two linears in bf16 on a CPU and, compiled or not, on a GPU; ``make`` builds the optimizer."""
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256, bias=False)).to(
            device, torch.bfloat16
        )
        optimizer = make(model)
        x = torch.randn(128, 256, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
        found[device] = losses(model, optimizer, x, 10, torch.compile(model) if compiled and device == "cuda" else None)
    return found
