"""ZeRO stage 0: every rank holds the whole model. fp32 runs on the facade itself, bf16 on DeepSpeed's wrapper."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ds_mofa.deepspeed import bases
from ds_mofa.deepspeed.zero import MatrixMixin, swap_class
from ds_mofa.optimizer import MatrixOptimizer

__all__ = ["replicated", "wrap_replicated"]


def wrap_replicated(optimizer: Any, mofa: MatrixOptimizer) -> Any:
    """Weave ``mofa``'s matrices into the 16-bit wrapper that DeepSpeed has built around its AdamW."""
    # It has stepped AdamW once, on zero gradients, to make its state: with weight decay the weights have moved.
    if mofa.adamw is not None:
        mofa.adamw.state.clear()
        for group in mofa.adamw.param_groups:
            group.pop("step", None)
    optimizer.refresh_fp32_params()
    return swap_class(optimizer, Bf16ReplicatedMixin, mofa)


def _adamw_grads(params: Iterable[nn.Parameter]) -> tuple[list[Tensor], dict]:
    """AdamW's gradients for the engine's all-reduce; left to itself it would make a zero one for every matrix."""
    grads = []
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        grads.append(param.grad.data)
    return grads, {}


def replicated(kind: type[MatrixOptimizer]) -> type[MatrixOptimizer]:
    """The facade as the engine's own optimizer: stage 0 in fp32."""
    return type(f"Replicated{kind.__name__}", (_ReplicatedMixin, kind), {})


if TYPE_CHECKING:
    Facade = MatrixOptimizer
else:
    Facade = object  # the class of the optimizer, over which the mixin is put


class _ReplicatedMixin(Facade):
    overflow = False
    matrix_state: dict | None = None
    _global_grad_norm: Tensor | None = None

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict]:
        return _adamw_grads(p for group in self.adamw_groups for p in group["params"])

    def step(self, closure: Any = None) -> Any:
        if not self.matrices.pending:  # the engine has not clipped, which would have given the norm
            self.clip_grad_norm_(float("inf"))
        self.overflow = not self.matrices.finite
        return super().step(closure)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        self._global_grad_norm = super().clip_grad_norm_(max_norm)
        return self._global_grad_norm

    def state_dict(self) -> dict:
        return self.with_matrix_state(self.matrix_state or {})

    def destroy(self) -> None:
        self.matrices.detach()


class Bf16ReplicatedMixin(MatrixMixin, bases.Replicated16):
    """FP16_Optimizer and FP16_UnfusedOptimizer, which DeepSpeed uses for bf16 too."""

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict]:
        return _adamw_grads(p for group in self.fp16_groups for p in group)

    def deepspeed_step(self) -> Any:
        if not self.mofa.matrices.finite:
            return self._skip_invalid_grad_norm()
        return super().deepspeed_step()

    def unscale_and_clip_grads(self, *args: Any, **kwargs: Any) -> Any:
        *grads, norm = args
        self._global_grad_norm = self.with_matrix_norm([torch.as_tensor(norm)])
        return super().unscale_and_clip_grads(*grads, self._global_grad_norm, **kwargs)

    def load_state_dict(self, state_dict: dict, load_optimizer_states: bool = True) -> None:
        super().load_state_dict(state_dict, load_optimizer_states=load_optimizer_states)
        if load_optimizer_states:
            self.load_matrices(state_dict)
        else:
            self.mofa.matrices.masters.refresh()
