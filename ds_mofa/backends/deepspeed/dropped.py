"""Gradients that a script drops between backward and step: the sketches follow what becomes of AdamW's part.

A sketch cannot be dropped by ``param.grad = None``. What that, ``model.zero_grad()``, ``engine.zero_grad()`` and
``engine.optimizer.zero_grad()`` do to the gradients of AdamW's part is DeepSpeed's: where they add up in ``.grad``
until the step's last micro-batch (stages 0 and 1, and stage 2 with ``adamw_reduce="step"``) they are gone; where
DeepSpeed has put them into buffers of its own they stay. One half of a model must not forget a batch from which the
other half learns.
"""

from collections.abc import Sequence

from torch import nn

__all__ = ["AdamWGradients"]


class AdamWGradients:
    """Whether AdamW's gradients of the micro-batches since the last step are still there.

    Args:
        params: of the model, which AdamW trains.

    Attributes:
        restarted: the next backward overwrites what there is: stage 3's ``zero_grad`` sets the count of micro-batches
            to zero, and leaves the gradients to a step that comes at once.
    """

    def __init__(self, params: Sequence[nn.Parameter]):
        self._params = params
        self._held = False
        self.restarted = False

    def look(self) -> None:
        """After a backward or a step: remember whether there are any where a script can drop them."""
        self._held = self._any()

    def dropped(self, before_backward: bool = False) -> bool:
        """Whether a script has dropped them since the last :meth:`look`; told once."""
        gone = self._held and not self._any() or before_backward and self.restarted
        if gone:
            self._held = self.restarted = False
        return gone

    def _any(self) -> bool:
        return any(param.grad is not None or getattr(param, "grad_accum", None) is not None for param in self._params)
