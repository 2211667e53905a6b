"""Momentum reset and weight refactorization (arXiv 2505.22922, "Scalable Parameter and Memory Efficient Pretraining").

*Momentum reset*: every so many steps (200 in the paper, as reported) an optimizer forgets its state and begins anew,
bias correction included, as if it had just been built. With GaLore and Fira the next step therefore also refreshes the
subspace; with ``reset_every`` equal to ``refresh_every`` both happen together, at each refresh. The paper's code lowers
the learning rate at a restart and raises it again within a few steps; that is left to the schedule.

*Weight refactorization*: the factors of a low-rank B A (m x r and r x n) are replaced by others with the same product,

    B A = U diag(s) V^T:     B <- U diag(s)^(1/2)      A <- diag(s)^(1/2) V^T

whose columns and rows are balanced. The moments of the old factors mean nothing for the new, and are forgotten. The
paper factorizes whole weights, W = B A; on adapters, W = W0 + B A, the same is done to what they add.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["forget_state", "balanced", "refactorize", "lora_pairs"]


def forget_state(optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter] | None = None) -> None:
    """Momentum reset: of ``params``, or of all. Optimizers of torch begin anew where they find no state."""
    for param in list(optimizer.state) if params is None else params:
        optimizer.state.pop(param, None)


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """B' (m, r) and A' (r, n) with B' A' = B A and B'^T B' = A' A'^T = diag(s), through r x r matrices alone.

    A direction in which B A vanishes would vanish in both B' and A', where no gradient reaches it again (the product's
    gradient in each factor is a multiple of the other). Where B A has rank below r, as at LoRA's start with B = 0,
    the factors are returned as they are.
    """
    exact = torch.promote_types(B.dtype, torch.float32)
    Q_B, R_B = torch.linalg.qr(B.to(exact))
    Q_A, R_A = torch.linalg.qr(A.to(exact).mT)
    U, s, Vt = torch.linalg.svd(R_B @ R_A.mT)
    if s[-1] <= len(s) * torch.finfo(exact).eps * s[0]:
        return B, A
    root = s.sqrt()
    return (Q_B @ U * root).to(B.dtype), (root[:, None] * (Vt @ Q_A.mT)).to(A.dtype)


@torch.no_grad()
def refactorize(
    pairs: Iterable[tuple[nn.Parameter, nn.Parameter]], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Balance each pair (B, A) in place, and have ``optimizer`` forget its moments of them."""
    for B, A in pairs:
        for factor, value in zip((B, A), balanced(B, A)):
            factor.copy_(value)
        if optimizer is not None:
            forget_state(optimizer, (B, A))


def lora_pairs(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """(B, A) of every trained adapter of a peft model: modules whose ``lora_A`` and ``lora_B`` hold linears by name."""
    for module in model.modules():
        A, B = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(A, nn.ModuleDict) and isinstance(B, nn.ModuleDict):
            for name in A:
                if A[name].weight.requires_grad and B[name].weight.requires_grad:
                    yield B[name].weight, A[name].weight
