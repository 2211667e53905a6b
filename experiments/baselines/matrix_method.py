"""What every baseline shares: the loop over matrices, decoupled weight decay, and a state that resumes bit for bit."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_mofa.capture.attach import Attachment, attach
from ds_mofa.options import CaptureMode
from ds_mofa.parameters import Matrix
from experiments.baselines.orientation import like, wide
from experiments.baselines.projected_gradient import Gradient, ProjectedGradient

__all__ = ["MatrixMethod"]


class MatrixMethod(torch.optim.Optimizer):
    """W <- (1 - lr wd) W - lr f(m, n) D, with the direction D that a subclass computes from the gradient.

    States are float32 (float64 for float64 weights), whatever the weights are; 16-bit weights are rounded to nearest,
    as torch's own optimizers round them.

    Args:
        params: 2-D parameters or param groups of them, with ``lr`` and ``weight_decay`` in each group.
    """

    def __init__(self, params, **settings: Any):
        super().__init__(params, {"lr": 1e-3, "weight_decay": 0.0, **settings})
        self._places: dict[nn.Parameter, tuple[int, int]] = {}  # number of the group, index among all
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                self._places[p] = number, len(self._places)
        self._captured: dict[nn.Parameter, ProjectedGradient] = {}
        self._attachment: Attachment | None = None

    def direction(self, G: Gradient, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor:
        """D (s, l), descent being W - lr D.

        Args:
            G: the gradient seen wide, s x l with s <= l; whole, unless :meth:`projector` had given a P.
            state: of this matrix; ``state["step"]`` is t, 1 in the first step. What is put there is kept and saved.
            group: the settings.
            index: of the matrix among all; keys what is random.
        """
        raise NotImplementedError

    def projector(self, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor | None:
        """P (s, r), if P^T G is all that the step after ``state["step"]`` needs of G."""
        return None

    def lr_factor(self, m: int, n: int) -> float:
        """f(m, n), the factor on lr by shape."""
        return 1.0

    def capture(self, matrices: Sequence[Matrix], mode: CaptureMode) -> None:
        """From now on take gradients in backward, through :meth:`projector`; the matrices get no ``.grad``."""
        self._captured = {
            matrix.param: ProjectedGradient(matrix.shape, functools.partial(self._projector_of, matrix.param))
            for matrix in matrices
        }
        self._attachment = attach(matrices, list(self._captured.values()), mode)

    def detach(self) -> None:
        """End the capture: the matrices get their ``.grad`` again, for another optimizer of the same model."""
        if self._attachment is not None:
            self._attachment.remove()
            self._captured, self._attachment = {}, None

    @torch.no_grad()
    def step(self, closure=None):
        """Move every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._move_all()
        self._forget_captured()
        return loss

    def _move_all(self) -> None:
        # By their order, and not by the parameter: what is stepped may be a master in its place.
        everyone = ((group, p) for group in self.param_groups for p in group["params"])
        for index, (group, p) in enumerate(everyone):
            G = self._gradient(p)
            if G is None:
                continue
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            D = self.direction(G, state, group, index)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(like(D, p.shape), alpha=-group["lr"] * self.lr_factor(*p.shape))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients since the last step, captured ones included."""
        super().zero_grad(set_to_none)
        self._forget_captured()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state with each tensor's own dtype; torch's method would round it to that of the weights."""
        super().load_state_dict({**state_dict, "state": {}})
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for saved_id, p in zip(saved_ids, self._places):
            if saved_id in state_dict["state"]:
                saved = state_dict["state"][saved_id]
                self.state[p] = {
                    key: value.to(p.device) if isinstance(value, Tensor) else value for key, value in saved.items()
                }
        self._forget_captured()

    def _gradient(self, p: nn.Parameter) -> Gradient | None:
        captured = self._captured.get(p)
        if captured is None:
            value, whole = None if p.grad is None else wide(p.grad), True
        else:
            value, whole = captured.value, captured.P is None
        return None if value is None else Gradient(value.to(torch.promote_types(p.dtype, torch.float32)), whole)

    def _projector_of(self, p: nn.Parameter) -> Tensor | None:
        number, index = self._places[p]
        state = self.state.get(p)
        return self.projector(state, self.param_groups[number], index) if state else None

    def _forget_captured(self) -> None:
        for captured in self._captured.values():
            captured.value = None
