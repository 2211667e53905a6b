"""Norms without float64 copies.

DeepSpeed takes the norm of a gradient from a float64 copy of it, 4.2 GB for an output head of 525 M parameters: the
highest peak there is where activations are checkpointed. Here it is taken in pieces.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ds_mofa.deepspeed.bases import Stage12
from ds_mofa.deepspeed.gradients.pieces import norm_of

__all__ = ["NormMixin"]


class NormMixin(Stage12):
    """Over DeepSpeedZeroOptimizer."""

    def get_grad_norm_direct(
        self, gradients: Sequence[Tensor], params: Sequence[nn.Parameter], norm_type: float = 2
    ) -> Tensor:
        if norm_type == 2:  # a norm's norm is itself, so DeepSpeed gets those
            gradients = [norm_of(grad) for grad in gradients if not getattr(grad, "_zero_padding", False)]
        return super().get_grad_norm_direct(gradients, params, norm_type)

    def set_norm_for_param_grad_in_gpu(self, param: nn.Parameter) -> None:
        grad = self.get_param_gradient_attribute(param)
        grad = param.grad if grad is None else grad
        assert grad is not None  # DeepSpeed has just looked
        _, start, _, count = self.grad_position[self.get_param_id(param)]
        self.norm_for_param_grads[self.get_param_id(param)] = norm_of(grad.view(-1).narrow(0, start, count))
