"""The capture of every parameter: a gradient that autograd has computed is sketched and dropped.

It serves what no other capture does, and catches what reaches a captured weight by another road.
"""

from collections.abc import Callable

from torch import nn

from ds_mofa.capture.sink import Sink
from ds_mofa.phases import phase

__all__ = ["attach_hook"]


def attach_hook(param: nn.Parameter, sink: Sink) -> Callable[[], None]:
    """Put what autograd accumulates into ``param.grad`` into the sink, and return what undoes that."""

    def hook(param: nn.Parameter) -> None:
        grad = param.grad
        if grad is not None and grad is not sink.grad:  # the latter has sketched what was added to it
            with phase("capture"):
                sink.take(grad)

    return param.register_post_accumulate_grad_hook(hook).remove
