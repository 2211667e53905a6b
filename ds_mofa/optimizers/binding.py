"""When an optimizer is bound to its parameters: at once where these stay, else at its first use.

Accelerate and HF's Trainer build an optimizer over a whole model, and shard, wrap or move the model after that. They put
the new parameters into ``param_groups``, by position. So where that may happen nothing is made, and nothing refers to the
parameters, until the first forward, by which the model is what will be trained.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_mofa.parameters import Matrix, is_sharded
from ds_mofa.step.backend import ENGINES, Backend, OneProcess

__all__ = ["FirstForward", "announce", "connect", "refuse", "say", "say_of_upcast", "settled"]


def settled(params: Iterable[Tensor]) -> bool:
    """Whether these are the tensors that will be trained: sharded already, or in one process and where they would be moved
    to.
    """
    params = list(params)
    if any(param.is_meta for param in params):
        return False
    if any(map(is_sharded, params)):
        return True
    if dist.is_available() and dist.is_initialized():
        return False
    here = torch.accelerator.current_accelerator(check_available=True)
    return here is None or all(param.device.type == here.type for param in params)


def refuse(model: nn.Module) -> None:
    """Ask every engine before the parameters are divided, which would not say what has become of them.

    Raises:
        OptionError: it is too late to build an optimizer.
    """
    for engine in ENGINES:
        engine.refuse(model)


def announce(model: nn.Module, matrices: Sequence[Matrix]) -> Callable[[], None]:
    """Tell every engine of an optimizer that is built; what it returns undoes it."""
    undo = contextlib.ExitStack()
    for engine in ENGINES:
        done = engine.announce(model, matrices)
        if done is not None:
            undo.callback(done)
    return undo.close


def connect(model: nn.Module | None, matrices: Sequence[Matrix], group: dist.ProcessGroup | None) -> Backend:
    """The backend of matrices as they are now. Collective.

    Raises:
        OptionError: they cannot be trained right.
    """
    for engine in ENGINES:
        backend = engine.connect(model, matrices, group)
        if backend is not None:
            return backend
    return OneProcess(matrices[0].param.device, group)


class FirstForward:
    """Calls ``bind`` before the first forward with gradients of the model, or of any module that holds a matrix.

    Args:
        model: the whole of it.
        matrices: with their modules.
        bind: a method of the optimizer, which this does not keep alive.
    """

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix], bind: Callable[[], Any]):
        hook = _Hook(bind)
        modules = {id(module): module for matrix in matrices for module in matrix.modules} | {id(model): model}
        self._handles = [module.register_forward_pre_hook(hook) for module in modules.values()]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Hook:
    """What stands in a module until then; a copy or a pickle of the model has nothing to bind."""

    def __init__(self, bind: Callable[[], Any] | None = None):
        self._bind: Any = None if bind is None else weakref.WeakMethod(bind)

    @torch.compiler.disable
    def __call__(self, *_: Any) -> None:
        bind = None if self._bind is None else self._bind()
        # An evaluation, which one process may do alone, has nothing to sketch.
        if bind is not None and torch.is_grad_enabled():
            bind()

    def __deepcopy__(self, memo: Any) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()


def say(line: str) -> None:
    """Once a run, not once a process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        print(line, flush=True)


def say_of_upcast(before: Mapping[str, torch.dtype], matrices: Sequence[Matrix]) -> None:
    """Accelerate makes 16-bit weights fp32 where it trains in mixed precision."""
    upcast = [m for m in matrices if before[m.name].itemsize < m.param.dtype.itemsize]
    if upcast:
        was, now = (str(dtype).removeprefix("torch.") for dtype in (before[upcast[0].name], upcast[0].param.dtype))
        say(
            f"ds_mofa: {len(upcast)} matrices were {was} when the optimizer was built and are {now} now, so each weight takes "
            f'{upcast[0].param.dtype.itemsize} bytes: to keep them {was}, set mixed_precision "no" (HF: leave bf16 and fp16 '
            "out) for a model that is loaded so"
        )
