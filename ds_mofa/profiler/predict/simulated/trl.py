"""The head and the loss of TRL's ``SFTTrainer``, which takes log-probabilities of a tile of tokens and vocabulary at a time."""

import contextlib
import functools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import nn

from ds_mofa.profiler.predict.simulated.errors import PredictionError

__all__ = ["with_trl_loss"]

# What TRL reads out of a tile by a kernel, and adds a product to in place, on a GPU; elsewhere by operators with temporaries.
_IN_PLACE = ("_forward_tile", "_backward_tile", "_addmm_fp32")


@contextlib.contextmanager
def with_trl_loss(model: nn.Module, on_gpu: bool = True) -> Iterator[Callable[..., Any]]:
    """Within: a forward of ``model`` whose loss is TRL's, by TRL's own code.

    On a GPU it copies the tokens that have a label; here all have one, as in a batch without prompts and padding, and the
    copy is left out: 2 bytes a token and width.

    Args:
        on_gpu: without the temporaries of a CPU. Only for tensors without data.

    Raises:
        PredictionError: TRL is missing, or its head is elsewhere.
    """
    try:
        from trl.trainer.utils import add_fused_lm_head

        patches = [unittest.mock.patch(f"trl.kernels.chunked_logprob.{name}", _nothing) for name in _IN_PLACE if on_gpu]
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            add_fused_lm_head(cast(Any, model), outputs=("log_probs", "entropy", "is_top1"))
            yield functools.partial(model, fused_lm_head=True)
    except (ImportError, AttributeError) as error:
        if "trl" not in str(error) and not any(name in str(error) for name in (*_IN_PLACE, "add_fused_lm_head")):
            raise
        raise PredictionError(
            f"the loss of TRL's trainer is that of TRL 1.16 ({error}). Predict it with loss model"
        ) from error


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what allocates nothing."""
