"""What every peer shares: the loop over matrices, decoupled weight decay, and a state that resumes bit for bit."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["MatrixMethod", "wide"]


def wide(M: Tensor) -> Tensor:
    """M (m, n) with its smaller dimension first: M where m < n, its transpose else.

    One-sided methods project the smaller dimension. Seen wide, that is always the left one.
    """
    return M if M.shape[0] < M.shape[1] else M.mT


class MatrixMethod(torch.optim.Optimizer):
    """W <- (1 - lr wd) W - lr f(m, n) D, with the direction D that a subclass computes from the gradient.

    States are float32 (float64 for float64 weights), whatever the weights are; 16-bit weights are rounded to nearest,
    as torch's own optimizers round them.

    Args:
        params: 2-D parameters or param groups of them, with ``lr`` and ``weight_decay`` in each group.
    """

    def __init__(self, params, **settings: Any):
        super().__init__(params, {"lr": 1e-3, "weight_decay": 0.0, **settings})
        every = [p for group in self.param_groups for p in group["params"]]
        self._index = {p: index for index, p in enumerate(every)}

    def direction(self, G: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor:
        """D (s, l), descent being W - lr D.

        Args:
            G: (s, l), the gradient seen :func:`wide`, s <= l.
            state: of this matrix; ``state["step"]`` is t, 1 in the first step. What is put there is kept and saved.
            group: the settings.
            index: of the matrix among all; keys what is random.
        """
        raise NotImplementedError

    def lr_factor(self, m: int, n: int) -> float:
        """f(m, n), the factor on lr by shape."""
        return 1.0

    @torch.no_grad()
    def step(self, closure=None):
        """Move every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                G = wide(p.grad.to(torch.promote_types(p.dtype, torch.float32)))
                D = self.direction(G, state, group, self._index[p])
                p.mul_(1 - lr * decay)
                p.add_(D if p.shape[0] < p.shape[1] else D.mT, alpha=-lr * self.lr_factor(*p.shape))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state with each tensor's own dtype; torch's method would round it to that of the weights."""
        super().load_state_dict({**state_dict, "state": {}})
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for saved_id, p in zip(saved_ids, self._index):
            if saved_id in state_dict["state"]:
                saved = state_dict["state"][saved_id]
                self.state[p] = {
                    key: value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else value
                    for key, value in saved.items()
                }
